//! Following: the task checks batches of the leader and appends them to its log. The link acknowledges the progress
//! that the task publishes.

use std::time::Duration;

use super::{Actor, RoleState, bootstrap::ParsedTables, leading::AppendError, warnings::Condition};
use crate::{
    model::{LeaderEpoch, Offset},
    partition::{
        follower::{BatchHeader, FollowerAction, ProtocolViolation},
        leader::{
            divergence::{LogPosition, SubscribeOutcome},
            member::ReplicaProgress,
        },
        role::{LinkEvent, SubscribeResponse, WatermarkKind},
    },
    record::Batch,
};

impl Actor {
    /// Handles an event of the link to the leader. In another role, events are dropped: they belong to an earlier
    /// subscription.
    pub(super) async fn on_link_event(&mut self, event: LinkEvent) {
        let RoleState::Following(follower) = &mut self.role else { return };
        match event {
            LinkEvent::Connected => self.subscribe(),
            LinkEvent::Disconnected => {
                follower.on_disconnected();
                // The next subscription may have another outcome than a bootstrap.
                self.bootstrap_request.cancel();
            }
            LinkEvent::Response(response) => self.on_subscribe_response(response).await,
            LinkEvent::Batches { epoch, high_watermark, batches } => {
                self.on_batches_received(epoch, high_watermark, &batches)
            }
        }
    }

    /// Subscribes over the link, with the position of this log. Cancels a pending request for bootstrap tables.
    fn subscribe(&mut self) {
        let RoleState::Following(follower) = &mut self.role else { return };
        self.bootstrap_request.cancel();
        let log_end = self.log.log_end();
        let removal_count = self.metadata.added_after(self.broker);
        let position = LogPosition { removal_count, ..follower.subscribe(&self.log.epochs(), log_end) };
        let epoch = follower.epoch();
        sim_event!(LogPositionSent { partition: self.id, epoch, persisted: self.log.persisted_end() });
        let progress = ReplicaProgress { log_end, persisted_end: self.log.persisted_end() };
        self.ctx.links.subscribe(self.id, epoch, position, progress);
    }

    /// Ends the subscription, and requests another [`LinkEvent::Connected`] from the link after a pause.
    pub(super) fn resubscribe_later(&mut self) {
        if let RoleState::Following(follower) = &mut self.role {
            follower.on_disconnected();
            self.ctx.links.retry_later(self.id);
        }
    }

    /// Handles the leader's response to the subscription. An accepted follower copies. Otherwise the task truncates or
    /// bootstraps the log and subscribes again, or subscribes again after a pause. An invalid response is handled as a
    /// violation.
    async fn on_subscribe_response(&mut self, response: SubscribeResponse) {
        let RoleState::Following(follower) = &mut self.role else { return };
        let SubscribeResponse { epoch, high_watermark, outcome, in_sync: _ } = response;
        if let SubscribeOutcome::Rejected(reason) = outcome {
            tracing::debug!(
                partition = %self.id, leader = %follower.leader(), %epoch, %reason,
                "subscription rejected; retrying"
            );
            return self.resubscribe_later();
        }
        let action = follower.on_response(epoch, &outcome, high_watermark, &self.log.epochs());
        match action {
            Ok(FollowerAction::Truncate(to)) => {
                sim_event!(LeaderMessageApplied { partition: self.id, epoch });
                self.truncate_diverged(to).await;
            }
            Ok(FollowerAction::Bootstrap(start)) => match outcome {
                SubscribeOutcome::Bootstrap(tables) if !tables.from_object_store => {
                    // The records before `start` were deleted: the object store does not hold them.
                    self.log_start = self.log_start.max(start);
                    self.bootstrap_with(ParsedTables::from_leader(&tables)).await;
                }
                _ => self.request_tables(start, Duration::ZERO),
            },
            Ok(FollowerAction::Follow(_)) => {
                // The link then acknowledges the published progress, although no end moved. Appends of this turn are
                // not published yet, so that progress may be too low. The end of the turn wakes the link again.
                self.published.wake(WatermarkKind::AnyEnd);
            }
            Ok(FollowerAction::Append | FollowerAction::Ignore | FollowerAction::RetryLater) => {}
            Err(violation) => self.on_violation(violation),
        }
    }

    /// Truncates the log at `to`, where it diverges from the leader's, and subscribes again: at once, or after a pause
    /// if the disk is full. If the disk fails, the role ends.
    async fn truncate_diverged(&mut self, to: Offset) {
        tracing::info!(
            topic = %self.topic, partition = %self.id, %to, log_end = %self.log.log_end(),
            "truncating records that the leader lacks"
        );
        // A truncation below the start of the log on this disk would leave no epochs and no producer state. So the log
        // is reset to offset 0, and the next subscription bootstraps it.
        let is_truncated = if to < self.log.local_start().max(self.log.log_start()) {
            self.reset_to_zero().await
        } else {
            self.change_log(move |replica| replica.truncate(to).map(drop)).await
        };
        sim_event!(Truncated { partition: self.id, epoch: self.metadata.epoch(), to: self.log.log_end() });
        self.subscribe_or_retry(is_truncated);
    }

    /// Subscribes at once if the log changed, otherwise after a pause.
    pub(super) fn subscribe_or_retry(&mut self, log_changed: bool) {
        if log_changed { self.subscribe() } else { self.resubscribe_later() }
    }

    /// Handles batches from the leader: appends them, or handles their violation.
    fn on_batches_received(&mut self, epoch: LeaderEpoch, high_watermark: Offset, batches: &[Batch]) {
        let RoleState::Following(follower) = &mut self.role else { return };
        let headers: Option<Vec<BatchHeader>> = batches.iter().map(header).collect();
        let Some(headers) = headers else {
            if let Some(count) = self.warnings.occur(Condition::BadBatches) {
                let leader = follower.leader();
                tracing::warn!(
                    topic = %self.topic, partition = %self.id, %leader, count,
                    "the leader sent a batch without a leader epoch, which was dropped, and this replica subscribes \
                     again: if this continues for minutes, report it as a bug, with the logs of both brokers"
                );
            }
            return self.resubscribe_later();
        };
        match follower.on_batches(epoch, &headers, high_watermark) {
            Ok(FollowerAction::Append) => {
                sim_event!(LeaderMessageApplied { partition: self.id, epoch });
                self.copy(batches);
            }
            Ok(_) => {}
            Err(violation) => self.on_violation(violation),
        }
    }

    /// Appends checked batches in groups. If an append fails, the remaining batches are dropped. On a full disk the
    /// follower subscribes again after a pause; a failed disk ends the role.
    fn copy(&mut self, mut batches: &[Batch]) {
        let max_bytes = self.max_group_bytes();
        while !batches.is_empty() {
            let (mut count, mut bytes) = (0, 0);
            for batch in batches {
                if count > 0 && bytes + batch.encoded_len() > max_bytes {
                    break;
                }
                (count, bytes) = (count + 1, bytes + batch.encoded_len());
            }
            let (group, rest) = batches.split_at(count);
            batches = rest;
            match self.write(group, bytes) {
                Ok(()) => {}
                Err(AppendError::StorageFailed { reason }) => return self.fail(&reason),
                Err(error) => {
                    tracing::debug!(partition = %self.id, %error, "cannot append copied batches; retrying");
                    return self.resubscribe_later();
                }
            }
            let log_end = self.log.log_end();
            if let RoleState::Following(follower) = &mut self.role {
                follower.on_appended(log_end);
            }
        }
    }

    /// Handles a message of the leader that the follower cannot apply. A late message is ignored. A message of a newer
    /// epoch is dropped, and a pending subscription is repeated after a pause. A truncation of committed records is
    /// refused, and the replica subscribes again only on a new link or in a new epoch. After any other violation the
    /// replica subscribes again after a pause.
    fn on_violation(&mut self, violation: ProtocolViolation) {
        let RoleState::Following(follower) = &mut self.role else { return };
        let (leader, epoch) = (follower.leader(), follower.epoch());
        match violation {
            // The message is of an earlier link or epoch; the current subscription continues.
            ProtocolViolation::OldEpoch { .. } | ProtocolViolation::Unexpected => {
                tracing::trace!(
                    partition = %self.id, %leader, %epoch, error = %violation,
                    "ignored a late message of the leader"
                );
            }
            ProtocolViolation::NewEpoch { .. } => {
                tracing::debug!(
                    partition = %self.id, %leader, %epoch, error = %violation,
                    "received a message of a newer epoch; waiting for the metadata"
                );
                if follower.is_subscribing() {
                    self.resubscribe_later();
                }
            }
            ProtocolViolation::TruncateBelowCommitted { .. } => tracing::error!(
                topic = %self.topic, partition = %self.id, %leader, %epoch, error = %violation,
                "the replica stops copying until another broker leads: compare the two logs (strandline segment \
                 dump); if the leader is right, remove this replica and add it again (strandline partition reassign)"
            ),
            _ => {
                let consequence = match violation {
                    ProtocolViolation::BootstrapBelowCommitted { .. } => {
                        "this replica keeps its log, stays out of sync and subscribes again, until the leader has \
                         removed the segments below its log start"
                    }
                    _ => "the leader's message is invalid and was dropped, and this replica subscribes again",
                };
                if let Some(count) = self.warnings.occur(Condition::BadBatches) {
                    tracing::warn!(
                        topic = %self.topic, partition = %self.id, %leader, %epoch, error = %violation, count,
                        "{consequence}: if this continues for minutes, report it as a bug, with the logs of both \
                         brokers"
                    );
                } else {
                    tracing::debug!(partition = %self.id, error = %violation, "again: {consequence}");
                }
                self.resubscribe_later();
            }
        }
    }
}

/// Returns the fields of a batch that the follower checks; `None` if the batch has no leader epoch.
fn header(batch: &Batch) -> Option<BatchHeader> {
    Some(BatchHeader { base: batch.base_offset(), end: batch.end_offset(), epoch: batch.leader_epoch()? })
}
