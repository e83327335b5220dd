//! Containers for tests: the shipped image, built and run with podman, without touching the machine's own containers.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`command`] | running a program with a deadline |
//! | [`engine`] | a podman with a store, run directory and settings of its own, cleaned up on drop |
//! | [`image`] | the image of `deploy/Containerfile`, built without a registry |
//! | [`container`] | one running container: its output and its end |
//! | [`view`] | a container from outside: its namespaces and rights |
//! | [`compose`] | the shipped compose file, brought up as a user would |

pub mod command;
pub mod compose;
pub mod container;
pub mod engine;
pub mod image;
pub mod view;

pub use command::CommandError;
pub use compose::{Compose, ComposeError};
pub use container::{Container, Settings};
pub use engine::{Engine, EngineError};
pub use view::View;
