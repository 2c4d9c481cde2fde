#![no_main]
pageferry_fuzz::target!(control::hook);
