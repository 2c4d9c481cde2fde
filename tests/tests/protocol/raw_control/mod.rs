// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control protocol from raw bytes, as docs/control.md says.
//!
//! The VMM here encodes and decodes nothing by `pageferry-protocol`, so it shows that a VMM can be
//! written in any language. It uses that crate only for the system calls of userfaultfd, and
//! [`document`] to compare the document with it.
//!
//! - [`bytes`]: bodies field by field; [`bodies`]: those that several tests send;
//! - [`frames`]: frames with descriptors on a socket;
//! - [`vmm`]: a small VMM and its requests; [`hook_thread`]: how it answers hooks;
//! - [`requests`]: requests that are carried out; [`refusals`]: every request wrong in each way;
//! - [`vhost_user`]: frames in pieces, and the requests of vhost-user;
//! - [`hooks`]: every hook once answered with success, and once with an error;
//! - [`handover`]: jobs that move a guest from one such VMM to another;
//! - [`example`]: the example of the document, byte for byte;
//! - [`document`]: the document names every code, field, phase and counter.

mod bodies;
mod bytes;
mod document;
mod example;
mod frames;
mod handover;
mod hook_thread;
mod hooks;
mod refusals;
mod requests;
mod vhost_user;
mod vmm;
