// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process of a VMM, seen from outside.
