#![no_main]
pageferry_fuzz::target!(control::vhost_user);
