//! End-to-end tests, one binary: the real programs, in folders of their own.

#[cfg(test)]
mod addresses;
#[cfg(test)]
mod bad_input;
#[cfg(test)]
mod bad_luck;
#[cfg(test)]
mod chaos;
#[cfg(test)]
mod clients;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod full_disk;
#[cfg(test)]
mod gateway;
#[cfg(test)]
mod guard;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod load;
#[cfg(test)]
mod logs;
#[cfg(test)]
mod main_job;
#[cfg(test)]
mod models;
#[cfg(test)]
mod network;
#[cfg(test)]
mod numbers;
#[cfg(test)]
mod options;
#[cfg(test)]
mod podman;
#[cfg(test)]
mod quickstart;
#[cfg(test)]
mod registry;
#[cfg(test)]
mod removal;
#[cfg(test)]
mod restore;
#[cfg(test)]
mod root;
#[cfg(test)]
mod sessions;
#[cfg(test)]
mod settings;
#[cfg(test)]
mod upgrade;
