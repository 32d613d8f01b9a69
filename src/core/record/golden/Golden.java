// Writes the batches under kafka/ with Apache Kafka's own client code (4.3.1), so that they do not depend on
// Strandline's builder. The records are those of `golden_records` in ../tests.rs. Run once:
//     java -cp 'LIBS/*' Golden.java kafka
// The files never change: every later version of Strandline must read them.

import java.nio.ByteBuffer;
import java.nio.file.*;
import java.util.*;
import org.apache.kafka.common.compress.Compression;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.header.internals.RecordHeader;
import org.apache.kafka.common.record.TimestampType;
import org.apache.kafka.common.record.internal.*;

class Golden {
    static final Header[] NONE = {};

    public static void main(String[] args) throws Exception {
        for (CompressionType type : CompressionType.values()) {
            ByteBuffer buffer = ByteBuffer.allocate(1 << 20);
            MemoryRecordsBuilder builder = MemoryRecords.builder(buffer, (byte) 2, Compression.of(type).build(),
                TimestampType.CREATE_TIME, 1L << 40, -1L, 4_000_000_001L, (short) 7, 99, false, 3);
            builder.append(1_700_000_000_000L, "key".getBytes(), "value".getBytes(), new Header[] {
                new RecordHeader("trace", new byte[] {0, (byte) 0xff}),
                new RecordHeader("trace", (byte[]) null),
                new RecordHeader("", new byte[0]),
            });
            builder.append(1_699_999_999_000L, (byte[]) null, (byte[]) null, NONE);
            builder.append(1_700_000_000_500L, new byte[0], new byte[0], NONE);
            String line = "The strandline is where the high water mark stood. ";
            for (int n = 0; n < 24; n++)
                builder.append(1_700_000_000_000L + n, new byte[] {(byte) n}, line.repeat(n / 4).getBytes(), NONE);
            ByteBuffer built = builder.build().buffer();
            byte[] bytes = new byte[built.remaining()];
            built.get(bytes);
            Files.write(Path.of(args[0], type.name + ".batch"), bytes);
        }
    }
}
