"""Creates a topic, appends plain records and reads them back, with code generated from proto/ alone.

Usage: roundtrip.py HOST:PORT, with the generated code on PYTHONPATH:

    python -m grpc_tools.protoc --proto_path=proto --python_out=OUT --grpc_python_out=OUT proto/strandline/v1/*.proto
"""

import sys

import grpc

from strandline.v1 import admin_pb2, admin_pb2_grpc, log_pb2, log_pb2_grpc, types_pb2

TOPIC = "from-python"


def main(address: str) -> None:
    channel = grpc.insecure_channel(address)
    grpc.channel_ready_future(channel).result(timeout=10)
    admin = admin_pb2_grpc.AdminStub(channel)
    log = log_pb2_grpc.LogStub(channel)

    created = admin.CreateTopic(
        admin_pb2.CreateTopicRequest(name=TOPIC, partitions=2, config={"retention.ms": "3600000"}), timeout=10
    )
    assert created.topic.name == TOPIC and created.topic.partitions == 2, created

    sent = [
        types_pb2.Record(key=b"k", value="grüße".encode(), timestamp_ms=1_700_000_000_000),
        types_pb2.Record(value=b"", headers=[types_pb2.Header(key="h", value=b"1"), types_pb2.Header(key="h")]),
        types_pb2.Record(key=b"deleted"),
    ]
    appended = log.Append(
        log_pb2.AppendRequest(
            topic=TOPIC, partition=1, acks=types_pb2.ACKS_ALL, records=log_pb2.PlainRecords(records=sent)
        ),
        timeout=10,
    )
    assert (appended.base_offset, appended.end_offset) == (0, 3), appended
    assert appended.durability == types_pb2.DURABILITY_SYNCED and appended.replicas == 1, appended

    read = log.Read(
        log_pb2.ReadRequest(
            partitions=[log_pb2.FetchPartition(topic=TOPIC, partition=1, offset=0)],
            max_wait_ms=5000,
            plain=True,
            any_replica=True,
        ),
        timeout=10,
    )
    (part,) = read.partitions
    assert not part.HasField("error"), part
    assert (part.high_watermark, part.next_offset, part.from_follower) == (3, 3, False), part
    got = list(part.records)
    assert [record.offset for record in got] == [0, 1, 2], got
    for mine, theirs in zip(sent, got):
        # Absent and empty are not the same.
        assert mine.HasField("key") == theirs.HasField("key") and mine.key == theirs.key, theirs
        assert mine.HasField("value") == theirs.HasField("value") and mine.value == theirs.value, theirs
        assert list(mine.headers) == list(theirs.headers), theirs
    assert got[0].timestamp_ms == 1_700_000_000_000, got[0]

    cluster = admin.DescribeCluster(admin_pb2.DescribeClusterRequest(), timeout=10)
    (broker,) = cluster.brokers
    assert broker.alive and broker.leaders == 2 and broker.HasField("figures"), cluster
    assert (cluster.partitions, cluster.leaderless, cluster.moving) == (2, 0, 0), cluster
    order = admin_pb2.ReassignRequest(topic=TOPIC, partition=1, replicas=[broker.id])
    (moved,) = admin.Reassign(order, timeout=10).partitions
    assert moved.partition.partition == 1 and not moved.changed, moved
    try:
        admin.DrainBroker(admin_pb2.DrainBrokerRequest(broker=broker.id + 1), timeout=10)
        raise AssertionError("a broker that is not there was drained")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error

    # A stream ends once all that was sent is answered, also when nothing was.
    requests = [
        log_pb2.ProduceRequest(
            correlation=number,
            append=log_pb2.AppendRequest(topic=TOPIC, partition=0, records=log_pb2.PlainRecords(records=sent[:1])),
        )
        for number in range(5)
    ]
    answers = list(log.Produce(iter(requests), timeout=30))
    assert sorted(answer.correlation for answer in answers) == list(range(5)), answers
    assert all(answer.HasField("appended") for answer in answers), answers
    assert list(log.Produce(iter([]), timeout=30)) == []

    try:
        log.Append(
            log_pb2.AppendRequest(topic="nobody", records=log_pb2.PlainRecords(records=sent)), timeout=10
        )
        raise AssertionError("a topic that nobody created took records")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
        assert "nobody" in error.details(), error

    print(f"{len(got)} records written and read")


if __name__ == "__main__":
    main(sys.argv[1])
