//! A retry is recognised in each form that a broker gives its batch, after a failover and after a change of the topic's
//! configuration.

use super::{net::send_as, *};
use crate::{model::Compression, partition::leader::AdmitError, record::BatchBuilder};

const APPEND_TIME: &[(&str, &str)] =
    &[("remote.storage.enable", "false"), ("retention.ms", "-1"), ("message.timestamp.type", "LogAppendTime")];

/// Form in which a request's batch reaches the partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// The batch as the client sent it.
    AsSent,
    /// The batch in the topic's codec (`compression.type`).
    Recompressed,
    /// A batch that the broker made of records.
    OfRecords,
}

/// Writes a batch of one record with this value and sequence, in this form, and returns the result.
async fn write_as(to: &Partition, form: Form, value: &[u8], sequence: i32) -> AppendResult {
    // A broker that makes a batch from records gives them the time of their arrival.
    let time = if form == Form::OfRecords { crate::task::clock::wall_ms() } else { 5 };
    let mut builder = BatchBuilder::new(Compression::Gzip);
    builder.push(time, None, Some(value), &[]).unwrap();
    let batch = builder.finish(Some(ProducerSequence { id: 9, epoch: 0, base_sequence: sequence })).unwrap();
    let sent = (form != Form::OfRecords).then(|| batch.fingerprint());
    let batch = if form == Form::Recompressed { batch.recompress(Compression::Zstd).unwrap() } else { batch };
    send_as(to, batch, sent, Acks::All).await.await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_is_a_duplicate_after_failover_and_alter() {
    const FORMS: [Form; 3] = [Form::AsSent, Form::Recompressed, Form::OfRecords];
    for (before, after) in [(PLAIN, PLAIN), (PLAIN, APPEND_TIME), (APPEND_TIME, PLAIN), (APPEND_TIME, APPEND_TIME)] {
        let net = Net::new(2, 2, 2, false).await;
        let one = net.start(1, before, false).await;
        // The follower has the configuration to which the topic is altered.
        let two = net.start(2, after, false).await;
        wait_until_in_sync(&two).await;
        for (sequence, form) in (0..).zip(FORMS) {
            let stored = write_as(&one, form, b"own", sequence).await.unwrap();
            let retried = write_as(&one, form, b"own", sequence).await.unwrap();
            assert_eq!((retried.base, retried.duplicate), (stored.base, true), "{form:?}, {before:?}");
        }
        net.elect(2, &[]).await;
        wait_until("broker 2 leads", || two.status().role.leads()).await;
        wait_until_in_sync(&one).await;
        for (sequence, stored) in (0..).zip(FORMS) {
            let base = at(u64::try_from(sequence).unwrap());
            // The codec of the topic may have changed between the attempts, so a retry may be recompressed or not.
            let retries: &[Form] =
                if stored == Form::OfRecords { &[stored] } else { &[Form::AsSent, Form::Recompressed] };
            for retry in retries {
                let retried = write_as(&two, *retry, b"own", sequence).await.unwrap();
                assert_eq!(
                    (retried.base, retried.duplicate),
                    (base, true),
                    "{stored:?}, {retry:?}, {before:?} to {after:?}"
                );
            }
            // A batch with the same sequence and another value is a conflict.
            let conflicting = write_as(&two, retries[0], b"other", sequence).await;
            if stored == Form::AsSent && before == PLAIN {
                let conflict = AdmitError::SequenceConflict { producer: 9, sent: sequence, base };
                assert_eq!(conflicting, Err(AppendError::Refused(conflict)), "{before:?} to {after:?}");
            } else {
                // The log does not hold the batch as the client sent it, so the conflict cannot be detected: the batch
                // counts as a duplicate.
                assert!(conflicting.unwrap().duplicate, "{stored:?}, {before:?} to {after:?}");
            }
        }
        net.stop(2).await;
        net.stop(1).await;
    }
}
