//! Telling a restarted agent from a cloned disk.
//!
//! Each boot of each copy of an agent draws a random nonce. A new nonce after an old one is a reboot
//! (or a restart): fine, however often. A nonce that comes *back* after another one was seen means
//! that two copies are alive and take the session from each other: quarantine. A boot that is over
//! never speaks again, so one return is proof enough.

use berth_proto::ids::Mono;
use std::collections::VecDeque;

/// Boots remembered per host: a clone that reconnects is seen within two turns, the rest is for
/// hosts that reboot in a loop.
pub const REMEMBERED: usize = 8;
/// A boot not heard of for longer is forgotten, so that a nonce drawn twice by chance means nothing.
pub const FORGET_MS: u64 = 24 * 3600 * 1000;

/// What a hello means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takeover {
    /// The same boot again, or a new one.
    Fine,
    /// Two boots are alive.
    TwoBoots,
}

/// The boots of one host heard of lately, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Boots {
    heard: VecDeque<(String, Mono)>,
}

impl Boots {
    /// Judges a hello and remembers its boot. One that came back is not the newest by that: it comes
    /// back each time that it speaks, until an operator has decided.
    pub fn judge(&mut self, nonce: &str, now: Mono) -> Takeover {
        self.heard.retain(|(_, at)| now.since_ms(*at) <= FORGET_MS);
        let newest = self.heard.len().saturating_sub(1);
        match self.heard.iter().position(|(held, _)| held == nonce) {
            Some(at) => {
                self.heard[at].1 = now;
                if at < newest { Takeover::TwoBoots } else { Takeover::Fine }
            }
            None => {
                self.heard.push_back((nonce.to_owned(), now));
                while self.heard.len() > REMEMBERED {
                    self.heard.pop_front();
                }
                Takeover::Fine
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reboots_are_fine_and_a_boot_that_comes_back_is_not() {
        let mut boots = Boots::default();
        for (i, nonce) in ["a", "a", "b", "c", "c", "d"].into_iter().enumerate() {
            assert_eq!(boots.judge(nonce, Mono(i as u64)), Takeover::Fine, "{nonce}");
        }
        assert_eq!(boots.judge("b", Mono(9)), Takeover::TwoBoots);
    }

    #[test]
    fn a_boot_that_came_back_is_two_boots_however_often_it_asks() {
        let mut boots = Boots::default();
        for nonce in ["a", "b"] {
            boots.judge(nonce, Mono(0));
        }
        // The host may not be quarantined yet: that takes as long as the disk does.
        for ms in 1..4 {
            assert_eq!(boots.judge("a", Mono(ms)), Takeover::TwoBoots);
        }
        assert_eq!(boots.judge("b", Mono(9)), Takeover::Fine);
    }

    #[test]
    fn after_a_release_one_copy_may_go_on() {
        let mut boots = Boots::default();
        for nonce in ["a", "b"] {
            boots.judge(nonce, Mono(0));
        }
        assert_eq!(boots.judge("a", Mono(1)), Takeover::TwoBoots);
        // As a release of the quarantine forgets them.
        boots = Boots::default();
        assert_eq!(boots.judge("b", Mono(2)), Takeover::Fine);
        assert_eq!(boots.judge("b", Mono(3)), Takeover::Fine);
    }

    #[test]
    fn a_boot_heard_of_long_ago_is_forgotten() {
        let mut boots = Boots::default();
        boots.judge("a", Mono(0));
        boots.judge("b", Mono(FORGET_MS));
        assert_eq!(boots.judge("a", Mono(FORGET_MS + 2)), Takeover::Fine);
    }
}
