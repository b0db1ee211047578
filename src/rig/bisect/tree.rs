//! Revisions of a kernel tree: git chooses, make builds.
//!
//! git bisect runs in a worktree of its own below the output directory, so that the tree itself, its index and any
//! bisection in it stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::git::{self, git};
use super::worktree::Worktree;
use super::{Judged, Log, Trial, Verdict, child};
use crate::rig::boot_image::BootImage;
use crate::rig::stop::StopSignal;

/// The config fragments of scripts/config, by name.
pub const FRAGMENTS: [(&str, &str); 5] = [
    ("base", include_str!("../../../scripts/config/base.config")),
    ("coco", include_str!("../../../scripts/config/coco.config")),
    ("debug", include_str!("../../../scripts/config/debug.config")),
    ("fault", include_str!("../../../scripts/config/fault.config")),
    ("tdx-sim", include_str!("../../../scripts/config/tdx-sim.config")),
];

/// How a kernel is built.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// A complete configuration to start from; tinyconfig when there is none.
    pub config: Option<PathBuf>,
    /// Names of [`FRAGMENTS`], or paths.
    pub fragments: Vec<String>,
    /// Patches that every revision gets before it is built, in their order.
    pub patches: Vec<PathBuf>,
    /// make -j.
    pub jobs: usize,
}

/// What a bisection of revisions came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TreeFound {
    /// The first bad commit.
    First(String),
    /// The first bad commit is one of these; the others cannot be judged.
    Among(Vec<String>),
    /// The good revision is not good, or the bad one not bad.
    WrongEnd {
        /// The revision.
        revision: String,
        /// What it was taken for.
        taken_for: Verdict,
        /// What it is.
        is: Verdict,
    },
}

/// A kernel tree that is being bisected.
#[derive(Debug)]
pub struct Tree {
    repository: PathBuf,
    worktree: Worktree,
    build: PathBuf,
    options: BuildOptions,
}

impl Tree {
    /// A worktree of `repository` in `out`/tree, built in `out`/build.
    ///
    /// # Errors
    /// When `repository` is not one, or a fragment is not known, or the worktree cannot be made.
    pub fn open(repository: &Path, out: &Path, options: BuildOptions) -> Result<Tree> {
        let repository =
            repository.canonicalize().with_context(|| format!("--tree {}: cannot be read", repository.display()))?;
        for name in &options.fragments {
            fragment(name)?;
        }
        let absolute =
            |path: &PathBuf| path.canonicalize().with_context(|| format!("--patch {}: cannot be read", path.display()));
        let patches = options.patches.iter().map(absolute).collect::<Result<_>>()?;
        let options = BuildOptions { patches, ..options };
        fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
        let out = out.canonicalize().with_context(|| format!("--out {}", out.display()))?;
        git(&repository, &["rev-parse", "--git-dir"])
            .with_context(|| format!("--tree {}: is not a git repository", repository.display()))?;
        let worktree = Worktree::open(&repository, &out)?;
        Ok(Tree { repository, worktree, build: out.join("build"), options })
    }

    /// The commit that a revision names.
    ///
    /// # Errors
    /// When it names none.
    pub fn commit(&self, flag: &str, revision: &str) -> Result<String> {
        git(&self.repository, &["rev-parse", "--verify", "--quiet", &format!("{revision}^{{commit}}")])
            .map_err(|_| anyhow::anyhow!("{flag} {revision}: is no commit of {}", self.repository.display()))
    }

    /// `abbreviated subject` of a commit.
    pub fn title(&self, commit: &str) -> String {
        git(&self.repository, &["show", "-s", "--format=%h %s (%an, %as)", commit])
            .unwrap_or_else(|_| commit.to_owned())
    }

    /// The verdict on the nearest good ancestor of a commit that has one.
    pub fn last_good(&self, commit: &str, log: &Log) -> Option<Judged> {
        let parent = git(&self.repository, &["rev-parse", &format!("{commit}^")]).ok()?;
        let judged_good = |commit: &str| log.verdict(commit).filter(|judged| judged.verdict == Verdict::Good).cloned();
        judged_good(&parent).or_else(|| {
            let ancestors = git(&self.repository, &["rev-list", "--max-count=10000", &parent]).ok()?;
            ancestors.lines().find_map(judged_good)
        })
    }

    /// Bisects between two commits; `judge` gives the verdict on the commit that is checked out.
    ///
    /// # Errors
    /// What git and `judge` return.
    pub fn bisect(
        &self,
        good: &str,
        bad: &str,
        mut judge: impl FnMut(&Tree, &str) -> Result<Verdict>,
    ) -> Result<TreeFound> {
        // Left over from a bisection that was interrupted; the log knows its verdicts.
        let _ = git(&self.worktree.path(), &["bisect", "reset"]);
        for (revision, taken_for) in [(good, Verdict::Good), (bad, Verdict::Bad)] {
            git(&self.worktree.path(), &["checkout", "--quiet", "--detach", "--force", revision])?;
            let is = judge(self, revision)?;
            if is != taken_for {
                return Ok(TreeFound::WrongEnd { revision: revision.to_owned(), taken_for, is });
            }
        }
        let mut said = git::said(&self.worktree.path(), &["bisect", "start", "--no-checkout", bad, good])?;
        loop {
            if let Some(found) = found(&said.text) {
                let _ = git(&self.worktree.path(), &["bisect", "reset"]);
                return Ok(found);
            }
            if !said.success {
                bail!("git bisect: {}", said.text.trim());
            }
            // --no-checkout leaves the choice in BISECT_HEAD; checking it out here keeps git's own output out of the way.
            let next = git(&self.worktree.path(), &["rev-parse", "--verify", "BISECT_HEAD"])?;
            git(&self.worktree.path(), &["checkout", "--quiet", "--detach", "--force", &next])?;
            let word = match judge(self, &next)? {
                Verdict::Good => "good",
                Verdict::Bad => "bad",
                Verdict::CannotTell => "skip",
            };
            said = git::said(&self.worktree.path(), &["bisect", word, &next])?;
        }
    }

    /// Builds what is checked out; the run without a result says why it cannot be built.
    ///
    /// # Errors
    /// When make cannot be started or was stopped by a signal, or the configuration cannot be written.
    pub fn build(&self, commit: &str, stop: &StopSignal) -> Result<std::result::Result<BootImage, Judged>> {
        fs::create_dir_all(&self.build).context("the build directory")?;
        if let Some(failed) = self.patch(commit, stop)? {
            return Ok(Err(failed));
        }
        let config = self.build.join(".config");
        let steps: &[&[&str]] = match &self.options.config {
            Some(_) => &[&["olddefconfig"]],
            None => &[&["tinyconfig"]],
        };
        if let Some(given) = &self.options.config {
            fs::copy(given, &config).with_context(|| format!("--config {}", given.display()))?;
        }
        for targets in steps {
            if let Some(failed) = self.make(commit, targets, stop)? {
                return Ok(Err(failed));
            }
        }
        if let Some(failed) = self.merge(commit, stop)? {
            return Ok(Err(failed));
        }
        let jobs = format!("-j{}", self.options.jobs);
        for targets in [&["olddefconfig"][..], &[&jobs, "bzImage"]] {
            if let Some(failed) = self.make(commit, targets, stop)? {
                return Ok(Err(failed));
            }
        }
        match BootImage::read(&self.build) {
            Ok(image) => Ok(Ok(image)),
            Err(error) => Ok(Err(Judged::untried(commit, Trial::none(error.to_string(), Vec::new())))),
        }
    }

    /// Applies the patches that the revision does not have already. They go into the index as well, so that the next
    /// checkout takes them away with the files that they add.
    fn patch(&self, commit: &str, stop: &StopSignal) -> Result<Option<Judged>> {
        let apply = |patch: &Path, how: &[&str]| {
            let mut command = Command::new("git");
            command.arg("-C").arg(self.worktree.path()).arg("apply").args(how).arg(patch).env("LC_ALL", "C");
            command
        };
        for patch in &self.options.patches {
            let there = child::run("git apply", &mut apply(patch, &["--check", "--reverse"]), stop)?;
            if there.status.success() {
                continue;
            }
            let name = format!("git apply {}", patch.display());
            if let Some(failed) =
                self.step(commit, &name, apply(patch, &["--index", "-C1", "--whitespace=nowarn"]), stop)?
            {
                return Ok(Some(failed));
            }
        }
        Ok(None)
    }

    /// Merges the fragments with the tree's own script; a revision without it gets them appended, for olddefconfig to
    /// sort out.
    fn merge(&self, commit: &str, stop: &StopSignal) -> Result<Option<Judged>> {
        if self.options.fragments.is_empty() {
            return Ok(None);
        }
        let mut text = String::new();
        for name in &self.options.fragments {
            text.push_str(&fragment(name)?);
        }
        let config = self.build.join(".config");
        let merged = self.build.join("gmemtest.config");
        fs::write(&merged, &text).context("the merged fragments")?;
        let script = self.worktree.path().join("scripts/kconfig/merge_config.sh");
        if !script.exists() {
            let mut whole = fs::read_to_string(&config).unwrap_or_default();
            whole.push_str(&text);
            fs::write(&config, whole).context("the configuration")?;
            return Ok(None);
        }
        let mut command = Command::new("sh");
        command
            .arg(script)
            .arg("-O")
            .arg(&self.build)
            .arg("-m")
            .arg(&config)
            .arg(&merged)
            .current_dir(self.worktree.path());
        self.step(commit, "merge_config.sh", command, stop)
    }

    fn make(&self, commit: &str, targets: &[&str], stop: &StopSignal) -> Result<Option<Judged>> {
        let mut command = Command::new("make");
        command.arg("-C").arg(self.worktree.path()).arg(format!("O={}", self.build.display()));
        if let Some(compiler) = with_ccache() {
            command.arg(format!("CC={compiler}"));
        }
        command.args(targets);
        self.step(commit, &format!("make {}", targets.join(" ")), command, stop)
    }

    fn step(&self, commit: &str, name: &str, mut command: Command, stop: &StopSignal) -> Result<Option<Judged>> {
        let ended = child::run(name, &mut command, stop)?;
        let failed = || Trial::none(format!("{name} failed ({})", ended.status), ended.tail.clone());
        Ok((!ended.status.success()).then(|| Judged::untried(commit, failed())))
    }
}

fn fragment(name: &str) -> Result<String> {
    if let Some((_, text)) = FRAGMENTS.iter().find(|(known, _)| *known == name) {
        return Ok((*text).to_owned());
    }
    let names: Vec<&str> = FRAGMENTS.iter().map(|(name, _)| *name).collect();
    fs::read_to_string(name).map_err(|error| {
        anyhow::anyhow!("--fragment {name}: is neither one of {} nor a file ({error})", names.join(", "))
    })
}

/// `ccache $CC` where there is one, so that revisions share what they have in common.
fn with_ccache() -> Option<String> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .any(|directory| directory.join("ccache").is_file())
        .then(|| format!("ccache {}", std::env::var("CC").unwrap_or_else(|_| "gcc".to_owned())))
}

/// The end of a bisection in what git says.
fn found(text: &str) -> Option<TreeFound> {
    let is_commit = |word: &str| word.len() >= 40 && word.chars().all(|c| c.is_ascii_hexdigit());
    if let Some(line) = text.lines().find(|line| line.ends_with("is the first bad commit")) {
        return line.split_whitespace().next().map(|commit| TreeFound::First(commit.to_owned()));
    }
    let only_skipped = text.contains("There are only 'skip'ped commits left to test");
    only_skipped.then(|| {
        TreeFound::Among(text.lines().map(str::trim).filter(|line| is_commit(line)).map(str::to_owned).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A repository with `count` commits, each of which has its number in `file` and the same in `kept`; the first one has
    /// a file more.
    fn repository(count: usize) -> (tempfile::TempDir, Vec<String>) {
        let directory = tempfile::tempdir().unwrap();
        let run = |arguments: &[&str]| git(directory.path(), arguments).unwrap();
        run(&["init", "--quiet"]);
        let mut commits = Vec::new();
        for number in 0..count {
            fs::write(directory.path().join("file"), number.to_string()).unwrap();
            fs::write(directory.path().join("kept"), "the same").unwrap();
            let first = directory.path().join("first");
            let _ = if number == 0 { fs::write(first, "") } else { fs::remove_file(first) };
            run(&["add", "--all"]);
            run(&["-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", &format!("change {number}")]);
            commits.push(run(&["rev-parse", "HEAD"]));
        }
        (directory, commits)
    }

    fn options() -> BuildOptions {
        BuildOptions { config: None, fragments: Vec::new(), patches: Vec::new(), jobs: 1 }
    }

    fn bisect(count: usize, verdict: impl Fn(usize) -> Verdict) -> (TreeFound, Vec<String>, usize) {
        let (directory, commits) = repository(count);
        let out = tempfile::tempdir().unwrap();
        let tree = Tree::open(directory.path(), out.path(), options()).unwrap();
        let mut asked = 0;
        let found = tree.bisect(&commits[0], &commits[count - 1], |tree, commit| {
            asked += 1;
            let checked_out: usize = fs::read_to_string(tree.worktree.path().join("file")).unwrap().parse().unwrap();
            assert_eq!(commits[checked_out], commit, "what is judged is checked out");
            Ok(verdict(checked_out))
        });
        drop(tree);
        let worktrees = git(directory.path(), &["worktree", "list"]).unwrap();
        assert_eq!(worktrees.lines().count(), 1, "{worktrees}");
        assert_eq!(git(directory.path(), &["for-each-ref", "refs/bisect"]).unwrap(), "");
        assert_eq!(git(directory.path(), &["status", "--porcelain"]).unwrap(), "");
        (found.unwrap(), commits, asked)
    }

    #[test]
    fn the_first_bad_commit_is_found() {
        for first in [1, 5, 10, 15] {
            let verdict = |number| if number < first { Verdict::Good } else { Verdict::Bad };
            let (found, commits, asked) = bisect(16, verdict);
            assert_eq!(found, TreeFound::First(commits[first].clone()));
            assert!(asked <= 6, "{asked}");
        }
    }

    #[test]
    fn what_cannot_be_judged_is_skipped() {
        let verdict = |number| match number {
            0 | 1 => Verdict::Good,
            2 | 3 => Verdict::CannotTell,
            _ => Verdict::Bad,
        };
        let (found, commits, _) = bisect(8, verdict);
        let TreeFound::Among(mut among) = found else { panic!("{found:?}") };
        among.sort();
        let mut expected = commits[2..5].to_vec();
        expected.sort();
        assert_eq!(among, expected);
    }

    #[test]
    fn files_that_do_not_differ_keep_their_times_in_the_next_bisection() {
        use std::os::unix::fs::MetadataExt;
        let (directory, commits) = repository(4);
        let out = tempfile::tempdir().unwrap();
        let bisect = || {
            let tree = Tree::open(directory.path(), out.path(), options()).unwrap();
            let found = tree.bisect(&commits[0], &commits[3], |tree, commit| {
                let number = fs::read_to_string(tree.worktree.path().join("file")).unwrap();
                assert_eq!(commits[number.parse::<usize>().unwrap()], commit);
                assert_eq!(tree.worktree.path().join("first").exists(), commit == commits[0], "removed when not of it");
                Ok(if commit == commits[3] { Verdict::Bad } else { Verdict::Good })
            });
            assert_eq!(found.unwrap(), TreeFound::First(commits[3].clone()));
            let made = fs::metadata(tree.worktree.path().join("kept")).unwrap();
            (made.ino(), made.mtime(), made.mtime_nsec())
        };
        let first = bisect();
        assert_eq!(bisect(), first, "checked out anew");
        // Killed: the worktree is still there, and gone on with.
        std::mem::forget(Tree::open(directory.path(), out.path(), options()).unwrap());
        assert_eq!(bisect(), first, "checked out anew");
        // Forgotten by the repository meanwhile.
        std::mem::forget(Tree::open(directory.path(), out.path(), options()).unwrap());
        fs::remove_dir_all(directory.path().join(".git/worktrees")).unwrap();
        bisect();
    }

    #[test]
    fn ends_are_tried_first() {
        let (found, commits, asked) = bisect(8, |_| Verdict::Good);
        let wrong = TreeFound::WrongEnd { revision: commits[7].clone(), taken_for: Verdict::Bad, is: Verdict::Good };
        assert_eq!((found, asked), (wrong, 2));
    }

    #[test]
    fn what_is_not_there_is_named_by_its_flag() {
        let (directory, _) = repository(1);
        let out = tempfile::tempdir().unwrap();
        let tree = Tree::open(directory.path(), out.path(), options()).unwrap();
        assert!(tree.commit("--good", "v9.9").unwrap_err().to_string().starts_with("--good v9.9: is no commit"));
        let missing = BuildOptions { fragments: vec!["nosuch".to_owned()], ..options() };
        let error = Tree::open(directory.path(), out.path(), missing).unwrap_err().to_string();
        assert!(
            error.starts_with("--fragment nosuch: is neither one of base, coco, debug, fault, tdx-sim nor a file"),
            "{error}"
        );
        let error = Tree::open(Path::new("/nonexistent"), out.path(), options()).unwrap_err().to_string();
        assert!(error.starts_with("--tree /nonexistent"), "{error}");
    }
}
