#![no_main]
pageferry_fuzz::target!(stream::record);
