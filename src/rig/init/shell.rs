//! A look around in the guest: the few commands that need no other program, and every command of this one.

use std::fs;
use std::io::{self, BufRead, Write};
use std::process::Command;

const HELP: &str = "\
ls [DIR]          names in a directory
cat FILE          contents of a file
echo TEXT > FILE  writes to a file (>> appends)
dmesg             the kernel log
exit              powers the machine off
anything else     a command of gmemtest: probe, list, run ..";

/// Reads commands from the console until `exit` or its end.
pub fn prompt() {
    println!(
        "gmemtest in {}; `help` lists the commands, Ctrl-A X ends QEMU",
        super::hello("console", Vec::new()).release
    );
    let mut lines = io::stdin().lock().lines();
    loop {
        print!("gmemtest# ");
        // The console is what there is to complain to.
        let _ = io::stdout().flush();
        let Some(Ok(line)) = lines.next() else { return };
        let words: Vec<&str> = line.split_whitespace().collect();
        let result = match words[..] {
            [] => Ok(()),
            ["exit" | "poweroff"] => return,
            ["help"] => {
                println!("{HELP}");
                Ok(())
            }
            ["ls"] => list("/"),
            ["ls", directory] => list(directory),
            ["cat", ref files @ ..] => files.iter().try_for_each(|file| show(file)),
            ["dmesg"] => dmesg(),
            ["echo", ref text @ .., ">", file] => fs::write(file, format!("{}\n", text.join(" "))),
            ["echo", ref text @ .., ">>", file] => append(file, &text.join(" ")),
            _ => Command::new("/init").args(&words).status().map(drop),
        };
        if let Err(error) = result {
            println!("{error}");
        }
    }
}

fn list(directory: &str) -> io::Result<()> {
    let mut names: Vec<String> = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()?;
    names.sort();
    names.iter().for_each(|name| println!("{name}"));
    Ok(())
}

fn show(file: &str) -> io::Result<()> {
    io::copy(&mut fs::File::open(file)?, &mut io::stdout().lock()).map(drop)
}

fn append(file: &str, text: &str) -> io::Result<()> {
    fs::OpenOptions::new().append(true).open(file)?.write_all(format!("{text}\n").as_bytes())
}

/// The whole log buffer (syslog(2), SYSLOG_ACTION_READ_ALL).
fn dmesg() -> io::Result<()> {
    let mut buffer = vec![0u8; 1 << 20];
    // SAFETY: the kernel writes at most the given number of bytes to the buffer.
    let count = unsafe { libc::klogctl(3, buffer.as_mut_ptr().cast(), buffer.len() as i32) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    io::stdout().lock().write_all(&buffer[..count as usize])
}
