// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

#![no_main]
pageferry_fuzz::target!(image::stored_index);
