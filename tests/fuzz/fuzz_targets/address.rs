#![no_main]
pageferry_fuzz::target!(address::address);
