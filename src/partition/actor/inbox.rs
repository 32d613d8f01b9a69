//! Inputs of the task: three queues, of which the task takes one input at a time.
//!
//! | queue | senders | when the task is busy |
//! | --- | --- | --- |
//! | signals | journal, followers, clock | a later signal replaces the earlier one, and no sender waits |
//! | control | metadata, links, ISR updates | control messages never wait behind writes |
//! | commands | writers, maintenance | writers wait for space; one turn takes many commands |

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{
    ActorCommand, ControlMessage, SPARE_COMMANDS,
    signals::{ActorSignals, PendingSignals},
};
use crate::task::Tasks;

/// Maximum number of commands that one turn takes from the queue.
const MAX_COMMANDS_PER_TURN: usize = 512;

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

/// Queue that is polled next while commands of a turn are left.
#[derive(Clone, Copy, Debug, Default)]
enum TurnStep {
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
    /// Commands of the current turn, in reverse order: the next command is the last element.
    turn: Vec<ActorCommand>,
    step: TurnStep,
    tasks: Tasks,
}

impl Inbox {
    pub(in crate::partition) fn new(
        signals: Arc<ActorSignals>,
        control: mpsc::Receiver<ControlMessage>,
        commands: mpsc::Receiver<ActorCommand>,
        tasks: Tasks,
    ) -> Self {
        Self { signals, control, commands, turn: Vec::new(), step: TurnStep::default(), tasks }
    }

    /// Waits for the next input. Between any two groups of commands it returns pending signals and control messages,
    /// once each. So neither a flood of writes nor a flood of batches from a leader delays the other inputs for long.
    pub(super) async fn next_input(&mut self) -> Input {
        if self.turn.is_empty() {
            self.turn.shrink_to(SPARE_COMMANDS);
            return self.wait_for_input().await;
        }
        loop {
            match self.step {
                TurnStep::Signals => {
                    // The woken writers run first.
                    tokio::task::yield_now().await;
                    self.step = TurnStep::Control;
                    if let Some(pending) = self.signals.take() {
                        return Input::Signals(pending);
                    }
                }
                TurnStep::Control => {
                    self.step = TurnStep::Commands;
                    if let Some(message) = self.next_control() {
                        return Input::Control(message);
                    }
                }
                TurnStep::Commands => {
                    self.step = TurnStep::Signals;
                    return Input::Commands;
                }
            }
        }
    }

    async fn wait_for_input(&mut self) -> Input {
        tokio::select! {
            biased;
            () = self.tasks.cancelled() => Input::Stop,
            pending = self.signals.next() => Input::Signals(pending),
            Some(message) = self.control.recv() => {
                // A stream of control messages does not block the command queue.
                while self.turn.len() < MAX_COMMANDS_PER_TURN && let Ok(command) = self.commands.try_recv() {
                    self.turn.push(command);
                }
                self.turn.reverse();
                Input::Control(message)
            }
            taken = self.commands.recv_many(&mut self.turn, MAX_COMMANDS_PER_TURN) => {
                self.turn.reverse();
                if taken == 0 { Input::Stop } else { Input::Commands }
            }
        }
    }

    /// Returns the next control message, if one is queued.
    pub(super) fn next_control(&mut self) -> Option<ControlMessage> {
        self.control.try_recv().ok()
    }

    /// Returns the next command of the turn.
    pub(super) fn next_command(&mut self) -> Option<ActorCommand> {
        self.turn.pop()
    }

    /// Waits for signals after [`Self::close`]. Drops each control message whose sender had its slot before the close.
    pub(super) async fn next_signals(&mut self) -> PendingSignals {
        loop {
            tokio::select! {
                biased;
                pending = self.signals.next() => return pending,
                Some(_late) = self.control.recv() => {}
            }
        }
    }

    /// Closes the queues and drops the queued control messages, so that their senders do not wait. Returns the queued
    /// commands.
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

    /// Takes the next input and returns its kind; one command of a turn is taken.
    async fn next(inbox: &mut Inbox) -> &'static str {
        match inbox.next_input().await {
            Input::Stop => "stop",
            Input::Signals(_) => "signals",
            Input::Control(_) => "control",
            Input::Commands => {
                assert!(inbox.next_command().is_some(), "a turn has commands");
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
            control.try_send(ControlMessage::Deposed(LeaderEpoch(1))).expect("the queue has space");
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

    /// The sender of a control message has its slot before the close, and stores the message after it.
    #[tokio::test(start_paused = true)]
    async fn control_message_stored_after_close_is_dropped() {
        let (control, control_messages) = mpsc::channel(1);
        let mut inbox = Inbox::new(Arc::default(), control_messages, mpsc::channel(1).1, Tasks::new());
        let slot = control.try_reserve().expect("the queue has space");
        assert_eq!(inbox.close().count(), 0);
        let (responder, response) = tokio::sync::oneshot::channel();
        slot.send(ControlMessage::Subscribe(Box::new(SubscribeMessage {
            peer: PeerId { broker: BrokerId(2), epoch: Revision(1) },
            epoch: LeaderEpoch(1),
            position: LogPosition { last_epoch: None, log_end: Offset::ZERO, removal_count: None },
            progress: ReplicaProgress::default(),
            responder,
        })));
        tokio::select! {
            biased;
            _pending = inbox.next_signals() => panic!("nothing was signalled"),
            dropped = response => assert!(dropped.is_err()),
            () = tokio::time::sleep(Duration::from_secs(1)) => panic!("the sender still waits"),
        }
    }
}
