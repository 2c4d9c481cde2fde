#![no_main]
pageferry_fuzz::target!(memory::range);
