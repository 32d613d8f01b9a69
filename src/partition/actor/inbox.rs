//! Inputs of the task: three queues, of which the task takes one input at a time.
//!
//! | queue | senders | when the task is busy |
//! | --- | --- | --- |
//! | signals | journal, followers, clock, writers | a later signal replaces the earlier one, and no sender waits |
//! | control | metadata, links, metadata store, object store | control messages do not wait behind queued writes |
//! | commands | writers, maintenance, configuration | senders wait for space; the task takes many commands at once |

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{
    ActorCommand, ControlMessage, SPARE_COMMANDS,
    signals::{ActorSignals, PendingSignals},
};
use crate::task::Tasks;

/// Maximum number of commands that the task takes from the queue at once.
const MAX_TAKEN_COMMANDS: usize = 512;

/// Input of the task.
pub(super) enum Input {
    /// The task was stopped, or all handles were dropped.
    Stop,
    Signals(PendingSignals),
    /// The first of the queued control messages.
    Control(ControlMessage),
    /// Commands, to be taken with [`Inbox::next_command`].
    Commands,
}

/// Queue that is checked next for an input while taken commands remain.
#[derive(Clone, Copy, Debug, Default)]
enum NextQueue {
    #[default]
    Signals,
    Control,
    Commands,
}

/// Queues of one task.
pub(in crate::partition) struct Inbox {
    signals: Arc<ActorSignals>,
    control: mpsc::Receiver<ControlMessage>,
    commands: mpsc::Receiver<ActorCommand>,
    /// Commands that were taken from the queue, in reverse order: the next command is the last element.
    taken: Vec<ActorCommand>,
    next_queue: NextQueue,
    tasks: Tasks,
}

impl Inbox {
    pub(in crate::partition) fn new(
        signals: Arc<ActorSignals>,
        control: mpsc::Receiver<ControlMessage>,
        commands: mpsc::Receiver<ActorCommand>,
        tasks: Tasks,
    ) -> Self {
        Self { signals, control, commands, taken: Vec::new(), next_queue: NextQueue::default(), tasks }
    }

    /// Waits for the next input. While taken commands remain, the inputs alternate: signals, control messages, a group
    /// of commands. So neither many writes nor many batches from a leader delay the other inputs for long.
    pub(super) async fn next_input(&mut self) -> Input {
        if self.taken.is_empty() {
            self.taken.shrink_to(SPARE_COMMANDS);
            return self.wait_for_input().await;
        }
        loop {
            match self.next_queue {
                NextQueue::Signals => {
                    // Lets the writers that the last group woke run before the next input.
                    tokio::task::yield_now().await;
                    self.next_queue = NextQueue::Control;
                    if let Some(pending) = self.signals.take() {
                        return Input::Signals(pending);
                    }
                }
                NextQueue::Control => {
                    self.next_queue = NextQueue::Commands;
                    if let Some(message) = self.next_control() {
                        return Input::Control(message);
                    }
                }
                NextQueue::Commands => {
                    self.next_queue = NextQueue::Signals;
                    return Input::Commands;
                }
            }
        }
    }

    /// Waits for an input: a stop, signals, a control message or commands, in this order of priority. The last two also
    /// take queued commands into `taken`.
    async fn wait_for_input(&mut self) -> Input {
        tokio::select! {
            biased;
            () = self.tasks.cancelled() => Input::Stop,
            pending = self.signals.next() => Input::Signals(pending),
            Some(message) = self.control.recv() => {
                // Commands are taken too, so that a stream of control messages does not delay them.
                while self.taken.len() < MAX_TAKEN_COMMANDS && let Ok(command) = self.commands.try_recv() {
                    self.taken.push(command);
                }
                self.taken.reverse();
                Input::Control(message)
            }
            count = self.commands.recv_many(&mut self.taken, MAX_TAKEN_COMMANDS) => {
                self.taken.reverse();
                // The queue returns no command only when all its senders are dropped.
                if count == 0 { Input::Stop } else { Input::Commands }
            }
        }
    }

    /// Returns the next control message, if one is queued.
    pub(super) fn next_control(&mut self) -> Option<ControlMessage> {
        self.control.try_recv().ok()
    }

    /// Returns the next taken command; `None` if none remains.
    pub(super) fn next_command(&mut self) -> Option<ActorCommand> {
        self.taken.pop()
    }

    /// Waits for signals after [`Self::close`]. Drops control messages of senders that reserved space before the close.
    pub(super) async fn next_signals(&mut self) -> PendingSignals {
        loop {
            tokio::select! {
                biased;
                pending = self.signals.next() => return pending,
                Some(_late) = self.control.recv() => {}
            }
        }
    }

    /// Closes the queues and drops the queued control messages, so that their senders do not wait for a response.
    /// Returns the queued commands. Called only while no taken command remains.
    pub(super) fn close(&mut self) -> impl Iterator<Item = ActorCommand> + '_ {
        self.control.close();
        while self.next_control().is_some() {}
        self.commands.close();
        std::iter::from_fn(|| self.commands.try_recv().ok())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::SubscribeMessage, *};
    use crate::{
        cluster::Revision,
        model::{BrokerId, LeaderEpoch, Offset},
        partition::leader::{
            divergence::LogPosition,
            member::{PeerId, ReplicaProgress},
        },
    };

    /// Takes the next input and returns its kind. Of commands, takes one.
    async fn next(inbox: &mut Inbox) -> &'static str {
        match inbox.next_input().await {
            Input::Stop => "stop",
            Input::Signals(_) => "signals",
            Input::Control(_) => "control",
            Input::Commands => {
                assert!(inbox.next_command().is_some(), "taken commands remain");
                "command"
            }
        }
    }

    #[tokio::test]
    async fn signals_and_control_messages_come_once_between_commands() {
        let (signals, tasks) = (Arc::<ActorSignals>::default(), Tasks::new());
        let (control, control_messages) = mpsc::channel(8);
        let (commands, queued) = mpsc::channel(8);
        let mut inbox = Inbox::new(Arc::clone(&signals), control_messages, queued, tasks.clone());
        for _ in 0..3 {
            control.try_send(ControlMessage::NewerEpoch(LeaderEpoch(1))).expect("the queue has space");
            commands.try_send(ActorCommand::Roll).expect("the queue has space");
        }
        signals.tick(1);
        assert_eq!(next(&mut inbox).await, "signals");
        assert_eq!(next(&mut inbox).await, "control");
        for now_ms in 2..4 {
            signals.tick(now_ms);
            let inputs = [next(&mut inbox).await, next(&mut inbox).await, next(&mut inbox).await];
            assert_eq!(inputs, ["signals", "control", "command"]);
        }
        assert_eq!(next(&mut inbox).await, "command");
        commands.try_send(ActorCommand::Roll).expect("the queue has space");
        tasks.cancel();
        assert_eq!(next(&mut inbox).await, "stop");
        assert_eq!(inbox.close().count(), 1);
        assert!(commands.try_send(ActorCommand::Roll).is_err() && control.is_closed());
    }

    /// The sender of a control message reserves space before the close, and stores the message after the close. The
    /// message must be dropped, so that its sender does not wait for a response.
    #[tokio::test(start_paused = true)]
    async fn control_message_stored_after_close_is_dropped() {
        let (control, control_messages) = mpsc::channel(1);
        let mut inbox = Inbox::new(Arc::default(), control_messages, mpsc::channel(1).1, Tasks::new());
        let permit = control.try_reserve().expect("the queue has space");
        assert_eq!(inbox.close().count(), 0);
        let (responder, response) = tokio::sync::oneshot::channel();
        permit.send(ControlMessage::Subscribe(Box::new(SubscribeMessage {
            peer: PeerId { broker: BrokerId(2), epoch: Revision(1) },
            epoch: LeaderEpoch(1),
            position: LogPosition { last_epoch: None, log_end: Offset::ZERO, removal_count: None },
            progress: ReplicaProgress::default(),
            responder,
        })));
        tokio::select! {
            biased;
            _pending = inbox.next_signals() => panic!("no signal is pending"),
            dropped = response => assert!(dropped.is_err()),
            () = tokio::time::sleep(Duration::from_secs(1)) => panic!("the sender still waits"),
        }
    }
}
