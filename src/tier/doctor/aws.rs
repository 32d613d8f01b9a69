//! Requests of the store checks through the vendor's S3 client, and the checks that only S3 has.

use std::ops::Range;

use aws_sdk_s3::{
    primitives::ByteStream,
    types::{ChecksumAlgorithm, ChecksumMode, CompletedMultipartUpload, CompletedPart},
};
use bytes::Bytes;

use super::{CheckOutcome, ConditionalPutResult, StoreCheck, StoreProbe, pattern, untried};
use crate::tier::s3::{S3, text};

const CHECKSUM: (&str, &str) =
    ("content checksum", "Uploads are read back and compared, so a store without checksums is equally safe.");

const UPLOADS: (&str, &str) = (
    "list multipart uploads",
    "A crash can leave an incomplete upload, which costs storage. Brokers abort old ones; if that is not possible, \
     give the bucket a life-cycle rule that aborts them.",
);

/// Returns the S3 checks as not tried, for a store that accepted no put.
pub(super) fn untried_checks() -> Vec<StoreCheck> {
    [CHECKSUM, UPLOADS].into_iter().map(|(name, meaning)| untried(name, meaning)).collect()
}

/// Checks content checksums and the listing of incomplete multipart uploads.
pub(super) async fn own_checks(s3: &S3, folder: &str) -> Vec<StoreCheck> {
    let checksum = match checksum(s3, &format!("{folder}/checksum")).await {
        Ok(true) => (CheckOutcome::Pass, "the store keeps the CRC-32C of an object".to_owned()),
        Ok(false) => (CheckOutcome::Unsupported, "the store keeps no checksum".to_owned()),
        Err(error) => (CheckOutcome::Unsupported, error),
    };
    let uploads = match s3.uploads().await {
        Ok(uploads) => (CheckOutcome::Pass, format!("{} incomplete uploads below this prefix", uploads.len())),
        Err(error) => (CheckOutcome::Unsupported, error),
    };
    vec![
        StoreCheck { name: CHECKSUM.0, outcome: checksum.0, detail: checksum.1, meaning: CHECKSUM.1 },
        StoreCheck { name: UPLOADS.0, outcome: uploads.0, detail: uploads.1, meaning: UPLOADS.1 },
    ]
}

async fn checksum(s3: &S3, key: &str) -> Result<bool, String> {
    let body = pattern(1000);
    let crc = crc32c::crc32c(&body).to_be_bytes();
    let expected = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, crc);
    let (bucket, key) = (&s3.bucket, s3.key(key));
    let put = s3.client.put_object().bucket(bucket).key(&key).body(ByteStream::from(body));
    let put = put.checksum_algorithm(ChecksumAlgorithm::Crc32C).checksum_crc32_c(&expected);
    s3.request(put.send()).await?;
    let head = s3.client.head_object().bucket(bucket).key(&key).checksum_mode(ChecksumMode::Enabled);
    Ok(s3.request(head.send()).await?.checksum_crc32_c() == Some(&expected))
}

impl StoreProbe for S3 {
    async fn put(&self, key: &str, body: Bytes) -> Result<(), String> {
        let put = self.client.put_object().bucket(&self.bucket).key(self.key(key)).body(ByteStream::from(body));
        self.request(put.send()).await.map(drop)
    }

    async fn put_new(&self, key: &str, body: Bytes) -> Result<ConditionalPutResult, String> {
        let put = self.client.put_object().bucket(&self.bucket).key(self.key(key)).body(ByteStream::from(body));
        let response = Box::pin(tokio::time::timeout(self.timeout, put.if_none_match("*").send())).await;
        let Ok(response) = response else { return Err(format!("no response within {:?}", self.timeout)) };
        match response {
            Ok(_) => Ok(ConditionalPutResult::Yes),
            Err(error) => match error.raw_response().map(|response| response.status().as_u16()) {
                Some(409 | 412) => Ok(ConditionalPutResult::Exists),
                Some(400 | 501) => Ok(ConditionalPutResult::NotKnown(text(&error))),
                _ => Err(text(&error)),
            },
        }
    }

    async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, String> {
        let get = self.client.get_object().bucket(&self.bucket).key(self.key(key));
        let response = self.request(get.range(format!("bytes={}-{}", range.start, range.end - 1)).send()).await?;
        let body = tokio::time::timeout(self.timeout, response.body.collect()).await;
        let body = body.map_err(|_| format!("the body did not end within {:?}", self.timeout))?;
        body.map(|body| body.into_bytes()).map_err(|error| error.to_string())
    }

    async fn head(&self, key: &str) -> Result<(u64, i64), String> {
        let head = self.request(self.client.head_object().bucket(&self.bucket).key(self.key(key)).send()).await?;
        let bytes = head.content_length().and_then(|bytes| u64::try_from(bytes).ok()).ok_or("no content length")?;
        let modified = head.last_modified().and_then(|time| time.to_millis().ok()).ok_or("no modification time")?;
        Ok((bytes, modified))
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, String> {
        let prefix = format!("{}/", self.key(folder));
        let listed = self.request(self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).send()).await?;
        Ok(listed.contents().iter().filter_map(|object| object.key()).map(str::to_owned).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), String> {
        self.request(self.client.delete_object().bucket(&self.bucket).key(self.key(key)).send()).await.map(drop)
    }

    async fn multipart(&self, key: &str, parts: Vec<Bytes>) -> Result<(), String> {
        let (bucket, key) = (&self.bucket, self.key(key));
        let created = self.request(self.client.create_multipart_upload().bucket(bucket).key(&key).send()).await?;
        let id = created.upload_id().ok_or("the store returned no upload id")?;
        let mut done = CompletedMultipartUpload::builder();
        for (number, part) in (1..).zip(parts) {
            let put = self.client.upload_part().bucket(bucket).key(&key).upload_id(id).part_number(number);
            let sent = self.request(put.body(ByteStream::from(part)).send()).await?;
            let part = CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag().map(str::to_owned));
            let part = part.set_checksum_crc32(sent.checksum_crc32().map(str::to_owned));
            done = done.parts(part.build());
        }
        let complete = self.client.complete_multipart_upload().bucket(bucket).key(&key).upload_id(id);
        self.request(complete.multipart_upload(done.build()).send()).await.map(drop)
    }
}
