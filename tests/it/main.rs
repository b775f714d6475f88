//! End-to-end tests, one binary: the real programs, in folders of their own.

#[cfg(test)]
mod bad_input;
#[cfg(test)]
mod guard;
#[cfg(test)]
mod main_job;
