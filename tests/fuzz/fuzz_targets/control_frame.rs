#![no_main]
pageferry_fuzz::target!(control::control_frame);
