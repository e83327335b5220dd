//! Which thread runs on which processor: the same for ours and for the peer.

use crate::processors;

/// Two processors, if there are two.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// For whoever asks: front-end or worker.
    pub asker: Option<usize>,
    /// For whoever answers: the daemon, or its peer.
    pub answerer: Option<usize>,
}

impl Place {
    /// The first two processors of this process; on a single one everything stays where it is.
    #[must_use]
    pub fn find() -> Place {
        let (asker, answerer) = processors::first_two().unzip();
        Place { asker, answerer }
    }
}
