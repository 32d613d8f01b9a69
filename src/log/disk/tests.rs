//! Both disks.
