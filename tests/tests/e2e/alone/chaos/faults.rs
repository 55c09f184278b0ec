//! The faults, and the plan by which they come: a seed gives the same faults in the same order, whatever the agents do.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::site::{NODE_AGENTS, NODES, SSHD};

/// A process that something is done to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    Master,
    /// The agent of a node, by its place in [`NODES`].
    Node(usize),
}

/// What goes wrong, or is done by an operator. Links are those of nodes, by their place in [`NODES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The link is closed, and can be made again.
    Cut(usize),
    /// Nothing passes the link, and nobody is told.
    BlackHole(usize),
    Delay(usize, Duration),
    Throttle(usize),
    /// The links of all nodes are cut again and again.
    Flap,
    /// SIGKILL, with the processes that a reload has left; the agent is started again.
    Kill(Agent),
    /// The node's sshd is killed with its sessions, and started again.
    KillSshd,
    /// SIGSTOP, and SIGCONT.
    Stop(Agent),
    Reload(Agent),
    /// Another file takes the program's place, and the agent reloads.
    Upgrade(Agent),
    /// The configuration changes, and SIGHUP tells the agent.
    Hangup(Agent),
    /// The certificates of the listeners are replaced, and a CA is added to those of callers.
    Certificates,
    /// There is no room in the master's state directory.
    FullDisk,
    /// The master has too few descriptors for those who connect.
    Descriptors,
}

impl Fault {
    /// Whether callers may fail: those who go through a node, or for `None` those who go to the front end itself.
    pub fn disturbs(&self, node: Option<usize>) -> bool {
        match *self {
            Self::Cut(at) | Self::BlackHole(at) | Self::Delay(at, _) | Self::Throttle(at) => node == Some(at),
            Self::Kill(Agent::Node(at)) | Self::Stop(Agent::Node(at)) => node == Some(at),
            Self::KillSshd => node == Some(SSHD),
            Self::Kill(Agent::Master) | Self::Stop(Agent::Master) | Self::Descriptors => true,
            Self::Flap => node.is_some(),
            Self::Reload(_) | Self::Upgrade(_) | Self::Hangup(_) | Self::Certificates | Self::FullDisk => {
                false
            }
        }
    }

    /// What is done something to, counted from the master; `None` is everything.
    fn subject(&self) -> Option<usize> {
        match *self {
            Self::Flap => None,
            Self::Cut(at) | Self::BlackHole(at) | Self::Delay(at, _) | Self::Throttle(at) => Some(1 + at),
            Self::KillSshd => Some(1 + SSHD),
            Self::Kill(agent)
            | Self::Stop(agent)
            | Self::Reload(agent)
            | Self::Upgrade(agent)
            | Self::Hangup(agent) => Some(match agent {
                Agent::Master => 0,
                Agent::Node(at) => 1 + at,
            }),
            Self::Certificates | Self::FullDisk | Self::Descriptors => Some(0),
        }
    }

    /// Two of them may come at once if they meet different processes.
    fn goes_with(&self, other: &Self) -> bool {
        matches!((self.subject(), other.subject()), (Some(one), Some(two)) if one != two)
    }
}

fn link(random: &mut StdRng) -> usize {
    random.random_range(0..NODES.len())
}

fn node_agent(random: &mut StdRng) -> Agent {
    Agent::Node(random.random_range(0..NODE_AGENTS))
}

/// One of each kind. All of them have come before the first comes again.
const DECK: [fn(&mut StdRng) -> Fault; 19] = [
    |random| Fault::Cut(link(random)),
    |random| Fault::BlackHole(link(random)),
    |random| Fault::Delay(link(random), Duration::from_millis(random.random_range(50..=300))),
    |random| Fault::Throttle(link(random)),
    |_| Fault::Flap,
    |_| Fault::Kill(Agent::Master),
    |random| Fault::Kill(node_agent(random)),
    |_| Fault::KillSshd,
    |_| Fault::Stop(Agent::Master),
    |random| Fault::Stop(node_agent(random)),
    |_| Fault::Reload(Agent::Master),
    |random| Fault::Reload(node_agent(random)),
    |_| Fault::Upgrade(Agent::Master),
    |random| Fault::Upgrade(node_agent(random)),
    |_| Fault::Hangup(Agent::Master),
    |random| Fault::Hangup(node_agent(random)),
    |_| Fault::Certificates,
    |_| Fault::FullDisk,
    |_| Fault::Descriptors,
];

/// One or two faults at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    pub faults: Vec<Fault>,
    /// How long they last. What takes longer by itself, such as a reload, is waited for.
    pub lasts: Duration,
    /// How long nothing happens once everything works again.
    pub pause: Duration,
}

/// An endless sequence of rounds.
pub struct Plan {
    random: StdRng,
    deck: Vec<Fault>,
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        Self { random: StdRng::seed_from_u64(seed), deck: Vec::new() }
    }

    /// Takes the next fault.
    fn draw(&mut self) -> Fault {
        loop {
            if let Some(fault) = self.deck.pop() {
                return fault;
            }
            self.deck = DECK.iter().map(|fault| fault(&mut self.random)).collect();
            self.deck.shuffle(&mut self.random);
        }
    }

    pub fn next_round(&mut self) -> Round {
        let mut faults = vec![self.draw()];
        let two = self.random.random_bool(0.5);
        if two && self.deck.last().is_some_and(|second| second.goes_with(&faults[0])) {
            faults.extend(self.deck.pop());
        }
        let mut time = |longest| Duration::from_millis(self.random.random_range(1000..=longest));
        // Nobody is taken for dead who stands still for three seconds.
        let stops = faults.iter().any(|fault| matches!(fault, Fault::Stop(_)));
        let lasts = time(if stops { 3000 } else { 5000 });
        Round { faults, lasts, pause: time(2000) }
    }
}

#[test]
fn a_seed_gives_the_same_faults_again_and_all_of_them() {
    let rounds = |seed| {
        let mut plan = Plan::new(seed);
        (0..40).map(|_| plan.next_round()).collect::<Vec<_>>()
    };
    assert_eq!(rounds(7), rounds(7));
    assert_ne!(rounds(7), rounds(8));
    let faults: Vec<_> = rounds(7).into_iter().flat_map(|round| round.faults).collect();
    for wanted in [Fault::Flap, Fault::KillSshd, Fault::Certificates, Fault::FullDisk, Fault::Descriptors] {
        assert!(faults[..DECK.len()].contains(&wanted), "no {wanted:?} in {faults:?}");
    }
}
