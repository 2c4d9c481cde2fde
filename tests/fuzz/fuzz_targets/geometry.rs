#![no_main]
pageferry_fuzz::target!(memory::geometry);
