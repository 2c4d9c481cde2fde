#![no_main]
pageferry_fuzz::target!(image::image_contents);
