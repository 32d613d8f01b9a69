"""Creates a topic, appends records without batches and reads them decoded, with code generated from proto/ alone.

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
            topic=TOPIC, partition=1, acks=types_pb2.ACKS_ALL, records=log_pb2.RecordList(records=sent)
        ),
        timeout=10,
    )
    assert (appended.base_offset, appended.end_offset) == (0, 3), appended
    assert appended.durability == types_pb2.ACK_DURABILITY_PERSISTED and appended.replicas == 1, appended

    read = log.Read(
        log_pb2.ReadRequest(
            partitions=[log_pb2.FetchPartition(topic=TOPIC, partition=1, offset=0)],
            max_wait_ms=5000,
            decode=True,
            any_replica=True,
        ),
        timeout=10,
    )
    (part,) = read.partitions
    assert not part.HasField("error"), part
    assert (part.high_watermark, part.next_offset, part.from_follower) == (3, 3, False), part
    got = list(part.records)
    assert [record.offset for record in got] == [0, 1, 2], got
    for expected, record in zip(sent, got):
        # An absent field differs from an empty one.
        assert expected.HasField("key") == record.HasField("key") and expected.key == record.key, record
        assert expected.HasField("value") == record.HasField("value") and expected.value == record.value, record
        assert list(expected.headers) == list(record.headers), record
    assert got[0].timestamp_ms == 1_700_000_000_000, got[0]

    cluster = admin.DescribeCluster(admin_pb2.DescribeClusterRequest(), timeout=10)
    (broker,) = cluster.brokers
    assert broker.alive and broker.leader_count == 2 and broker.HasField("stats"), cluster
    assert (cluster.partitions, cluster.leaderless, cluster.reassigning) == (2, 0, 0), cluster
    request = admin_pb2.ReassignPartitionsRequest(topic=TOPIC, partition=1, replicas=[broker.id])
    (reassignment,) = admin.ReassignPartitions(request, timeout=10).partitions
    assert reassignment.partition.partition == 1 and not reassignment.changed, reassignment
    try:
        admin.DrainBroker(admin_pb2.DrainBrokerRequest(broker=broker.id + 1), timeout=10)
        raise AssertionError("an unknown broker was drained")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error

    # A stream ends after the response to its last request, also without a request.
    requests = [
        log_pb2.ProduceRequest(
            correlation_id=number,
            append=log_pb2.AppendRequest(topic=TOPIC, partition=0, records=log_pb2.RecordList(records=sent[:1])),
        )
        for number in range(5)
    ]
    responses = list(log.Produce(iter(requests), timeout=30))
    assert sorted(response.correlation_id for response in responses) == list(range(5)), responses
    assert all(response.HasField("appended") for response in responses), responses
    assert list(log.Produce(iter([]), timeout=30)) == []

    try:
        log.Append(
            log_pb2.AppendRequest(topic="absent", records=log_pb2.RecordList(records=sent)), timeout=10
        )
        raise AssertionError("an unknown topic accepted records")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
        assert "absent" in error.details(), error

    print(f"{len(got)} records written and read")


if __name__ == "__main__":
    main(sys.argv[1])
