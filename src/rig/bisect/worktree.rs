//! A worktree that is one of its repository only while it is used.
//!
//! Its files and its index stay where they are, so that a bisection that goes on, or the next one, checks out only what
//! differs, and make builds only that. In the repository nothing stays: no worktree, no reference, no state of a bisection.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::git::git;

/// The file that says that `tree` and `handle` beside it are a bisection's.
const MARK: &str = ".gmemtest-bisect";

/// A worktree in the `tree` of a directory.
#[derive(Debug)]
pub(super) struct Worktree {
    repository: PathBuf,
    directory: PathBuf,
}

impl Worktree {
    /// Makes the one in `directory`/tree, or takes up what is there.
    ///
    /// # Errors
    /// When git refuses, or the directory cannot be written.
    pub(super) fn open(repository: &Path, directory: &Path) -> Result<Worktree> {
        let worktree = Worktree { repository: repository.to_owned(), directory: directory.to_owned() };
        if let Err(error) = worktree.take_possession() {
            // What is there is somebody else's, and nothing is to be closed.
            std::mem::forget(worktree);
            return Err(error);
        }
        // One that was not closed, because its process was killed, is gone on with.
        let open = worktree.link().exists() && worktree.administration().is_ok();
        let attached = if open { Ok(()) } else { worktree.attach() };
        if let Err(error) = attached {
            // Nothing is open yet that would have to be closed.
            let handle = worktree.handle().to_string_lossy().into_owned();
            let _ = git(repository, &["worktree", "remove", "--force", &handle]);
            std::mem::forget(worktree);
            return Err(error.context(format!("a worktree in {}", directory.display())));
        }
        Ok(worktree)
    }

    /// Where the files are.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.join("tree")
    }

    /// The file that makes a directory a worktree.
    fn link(&self) -> PathBuf {
        self.path().join(".git")
    }

    /// Where the index is kept while the worktree is closed.
    fn index(&self) -> PathBuf {
        self.directory.join("index")
    }

    /// The place at which git makes worktrees and removes them, which it does only with all their files.
    fn handle(&self) -> PathBuf {
        self.directory.join("handle")
    }

    /// Makes sure that what is checked out over, and removed, was made by a bisection.
    fn take_possession(&self) -> Result<()> {
        let mark = self.directory.join(MARK);
        if mark.exists() {
            return Ok(());
        }
        for path in [self.path(), self.handle()] {
            let holds = match fs::read_dir(&path) {
                Ok(mut entries) => entries.next().is_some(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            };
            if holds {
                bail!("{} is there, and no bisection made it: give --out another directory", path.display());
            }
        }
        fs::create_dir_all(&self.directory)?;
        Ok(fs::write(mark, "")?)
    }

    /// The directory in the repository that stands for the worktree.
    fn administration(&self) -> Result<PathBuf> {
        git(&self.path(), &["rev-parse", "--absolute-git-dir"]).map(PathBuf::from)
    }

    fn attach(&self) -> Result<()> {
        // Files without their index could not be told from files of the revision that is checked out.
        if !self.index().exists() {
            gone(fs::remove_dir_all(self.path()))?;
        }
        gone(fs::remove_file(self.link()))?;
        gone(fs::remove_dir_all(self.handle()))?;
        fs::create_dir_all(self.path())?;
        let handle = self.handle().to_string_lossy().into_owned();
        git(&self.repository, &["worktree", "add", "--no-checkout", "--detach", "--force", &handle, "HEAD"])?;
        self.hand_over(&self.handle(), &self.path())?;
        let administration = self.administration()?;
        if self.index().exists() {
            fs::copy(self.index(), administration.join("index"))?;
        }
        fs::remove_dir_all(self.handle())?;
        Ok(())
    }

    fn detach(&self) -> Result<()> {
        let administration = self.administration()?;
        fs::copy(administration.join("index"), self.index())?;
        fs::create_dir_all(self.handle())?;
        self.hand_over(&self.path(), &self.handle())?;
        let handle = self.handle().to_string_lossy().into_owned();
        git(&self.repository, &["worktree", "remove", "--force", &handle])?;
        Ok(())
    }

    /// Makes another directory the worktree.
    fn hand_over(&self, from: &Path, to: &Path) -> Result<()> {
        // Not renamed: `tree` may be a link to another file system.
        fs::copy(from.join(".git"), to.join(".git"))?;
        fs::remove_file(from.join(".git"))?;
        let administration = git(to, &["rev-parse", "--absolute-git-dir"])?;
        // What `git worktree repair` does, which is there since git 2.29 only.
        fs::write(Path::new(&administration).join("gitdir"), format!("{}\n", to.join(".git").display()))?;
        Ok(())
    }
}

/// Takes it out of the repository.
impl Drop for Worktree {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!(
                "gmemtest: the worktree {} stays in {}: {error:#}",
                self.path().display(),
                self.repository.display()
            );
        }
    }
}

/// What is not there need not be removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_somebody_else_is_left_alone() {
        let out = tempfile::tempdir().unwrap();
        let work = out.path().join("tree/work");
        fs::create_dir(out.path().join("tree")).unwrap();
        fs::write(&work, "of a week").unwrap();
        let error = Worktree::open(Path::new("/no/repository"), out.path()).unwrap_err().to_string();
        assert!(error.contains("no bisection made it: give --out another directory"), "{error}");
        assert_eq!(fs::read_to_string(&work).unwrap(), "of a week");
    }
}
