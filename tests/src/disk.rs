//! Small disks that a test fills.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{openssh::run, process::note_started};

/// A small file system of its own. It is unmounted with its owner.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// `size` is as mount(8) takes it. There must be nothing in the place yet.
    pub fn mount(at: &Path, size: &str) -> anyhow::Result<Self> {
        std::fs::create_dir(at)?;
        note_started(&format!("mount {}", at.display()));
        let options = format!("size={size},mode=700");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at))?;
        Ok(Self(at.to_owned()))
    }

    pub fn remount(&self, option: &str) -> anyhow::Result<()> {
        run(Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(&self.0))
    }

    /// Writes a file until there is no room; gives its path.
    pub fn fill(&self) -> anyhow::Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = File::create(&path)?;
        while file.write_all(&[0; 4096]).is_ok() {}
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}
