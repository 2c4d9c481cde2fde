#![no_main]
pageferry_fuzz::target!(image::working_set);
