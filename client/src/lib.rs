//! The thin library in the VMM.
