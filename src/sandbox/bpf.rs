//! Compiles rules for system calls to a program of the kernel's classic BPF.
//!
//! The kernel runs each filter once for each system call number when it installs it, so that it can
//! remember which calls are always allowed. A list of comparisons is run through to its end for
//! most of the numbers; this program searches by halves. It knows nothing of which calls are
//! allowed. The invariant: jumps lead forward, to instructions of the same program.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

/// What a filter returns: an action of the kernel (`SECCOMP_RET_*`) with its data.
pub(super) type Verdict = u32;

/// What a filter does with one system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// The same with all arguments.
    Always(Verdict),
    /// The first verdict if the argument at this position meets the condition, else the other one.
    If(u8, Condition, Verdict, Verdict),
}

/// A condition on the lower 32 bits of an argument, which are all that the kernel reads of those
/// that have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// They are one of these values.
    OneOf(&'static [u32]),
    /// The bits under the mask (first) have this value (second).
    Bits(u32, u32),
}

/// The architecture as audit names it: a filter also sees the calls of other ones.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_003e);
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_00b7);
#[cfg(target_arch = "riscv64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_00f3);
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
)))]
const ARCHITECTURE: Option<u32> = None;

/// Positions in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Instructions (`linux/bpf_common.h`).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Compiles `rules`, by the calls' numbers. All other calls get `default`, those of another
/// architecture `foreign`. Returns `None` if the architecture of this program isn't known.
pub(super) fn compile(
    rules: &BTreeMap<u32, Rule>,
    default: Verdict,
    foreign: Verdict,
) -> Option<BpfProgram> {
    let architecture = ARCHITECTURE?;
    let mut program = vec![
        instruction(LOAD, ARCH),
        branch(JUMP_IF_EQUAL, architecture, 1, 0),
        instruction(RETURN, foreign),
        instruction(LOAD, NUMBER),
    ];
    program.extend(search(&spans(rules, default)));
    Some(program)
}

/// Divides all numbers into spans of calls that are treated alike: each has its first number.
fn spans(rules: &BTreeMap<u32, Rule>, default: Verdict) -> Vec<(u32, Rule)> {
    let default = Rule::Always(default);
    let mut spans = vec![(0, default.clone())];
    let mut add = |first: u32, rule: &Rule| {
        if spans.last().is_some_and(|(start, _)| *start == first) {
            spans.pop();
        }
        if spans.last().is_none_or(|(_, last)| last != rule) {
            spans.push((first, rule.clone()));
        }
    };
    for (number, rule) in rules {
        add(*number, rule);
        add(number + 1, &default);
    }
    spans
}

/// Finds the span that has the number, by halves, and does what its rule says.
fn search(spans: &[(u32, Rule)]) -> BpfProgram {
    match spans {
        [] => Vec::new(),
        [(_, rule)] => apply(rule),
        _ => {
            let (low, high) = spans.split_at(spans.len() / 2);
            let (first, _) = high[0];
            let low = search(low);
            let mut program = match u8::try_from(low.len()) {
                Ok(skipped) => vec![branch(JUMP_IF_AT_LEAST, first, skipped, 0)],
                // A branch leads 255 instructions far, a jump as far as it has to.
                Err(_) => vec![
                    branch(JUMP_IF_AT_LEAST, first, 0, 1),
                    instruction(JUMP, u32::try_from(low.len()).unwrap_or(u32::MAX)),
                ],
            };
            program.extend(low);
            program.extend(search(high));
            program
        }
    }
}

fn apply(rule: &Rule) -> BpfProgram {
    let (argument, condition, then, otherwise) = match rule {
        Rule::Always(verdict) => return vec![instruction(RETURN, *verdict)],
        Rule::If(argument, condition, then, otherwise) => (*argument, condition, *then, *otherwise),
    };
    let half = if cfg!(target_endian = "big") { 4 } else { 0 };
    let mut program = vec![instruction(
        LOAD,
        ARGUMENTS + 8 * u32::from(argument) + half,
    )];
    let values: &[u32] = match condition {
        Condition::OneOf(values) => values,
        Condition::Bits(mask, value) => {
            program.push(instruction(AND, *mask));
            std::slice::from_ref(value)
        }
    };
    for value in values {
        program.extend([
            branch(JUMP_IF_EQUAL, *value, 0, 1),
            instruction(RETURN, then),
        ]);
    }
    program.push(instruction(RETURN, otherwise));
    program
}

fn instruction(code: u16, value: u32) -> sock_filter {
    branch(code, value, 0, 0)
}

fn branch(code: u16, value: u32, if_true: u8, if_false: u8) -> sock_filter {
    sock_filter {
        code,
        jt: if_true,
        jf: if_false,
        k: value,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Runs a program on a call as the kernel does: returns the verdict, and how many instructions
    /// that took.
    pub(in crate::sandbox) fn run(
        program: &[sock_filter],
        architecture: u32,
        number: u32,
        arguments: [u64; 6],
    ) -> (Verdict, usize) {
        let mut data = Vec::new();
        data.extend(number.to_ne_bytes());
        data.extend(architecture.to_ne_bytes());
        data.extend(0_u64.to_ne_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let (mut at, mut accumulator, mut steps) = (0, 0, 0);
        loop {
            let one = &program[at];
            at += 1;
            steps += 1;
            let skip = |jumps| usize::from(if jumps { one.jt } else { one.jf });
            match one.code {
                LOAD => {
                    let from = one.k as usize;
                    let bytes = data[from..from + 4].try_into().unwrap();
                    accumulator = u32::from_ne_bytes(bytes);
                }
                AND => accumulator &= one.k,
                JUMP => at += one.k as usize,
                JUMP_IF_EQUAL => at += skip(accumulator == one.k),
                JUMP_IF_AT_LEAST => at += skip(accumulator >= one.k),
                RETURN => return (one.k, steps),
                other => unreachable!("an unknown instruction {other}"),
            }
        }
    }

    #[test]
    fn every_number_gets_the_verdict_of_its_rule() {
        const DEFAULT: Verdict = 1;
        const FOREIGN: Verdict = 2;
        let architecture = ARCHITECTURE.unwrap();
        // Neighbours, gaps, the first number, conditions, and more than a branch can skip.
        let mut rules: BTreeMap<_, _> = (0..600)
            .filter(|number| number % 7 < 4)
            .map(|number| (number, Rule::Always(10 + number % 3)))
            .collect();
        rules.insert(5, Rule::If(1, Condition::OneOf(&[3, 9]), 20, 21));
        rules.insert(6, Rule::If(5, Condition::Bits(0xf0, 0x20), 22, 23));
        let program = compile(&rules, DEFAULT, FOREIGN).unwrap();
        let verdict = |number, arguments| run(&program, architecture, number, arguments).0;
        let last = [u32::MAX, 0x4000_0000, 601, 600];
        for number in (0..600).chain(last).filter(|it| ![5, 6].contains(it)) {
            let expected = match rules.get(&number) {
                Some(Rule::Always(verdict)) => *verdict,
                _ => DEFAULT,
            };
            assert_eq!(verdict(number, [0; 6]), expected, "of {number}");
            assert_eq!(run(&program, 0x1234, number, [0; 6]).0, FOREIGN);
        }
        // Only the lower half of an argument counts.
        for (value, expected) in [(3, 20), (9, 20), (1 << 32 | 9, 20), (0, 21), (4, 21)] {
            assert_eq!(verdict(5, [3, value, 3, 3, 3, 3]), expected);
        }
        for (value, expected) in [(0x20, 22), (0x12f, 22), (0x30, 23), (0, 23)] {
            assert_eq!(verdict(6, [0x20, 0x20, 0x20, 0x20, 0x20, value]), expected);
        }
        // Two for the architecture, one for the number.
        let spans = spans(&rules, DEFAULT).len();
        let most = 3 + 2 * spans.next_power_of_two().trailing_zeros() as usize + 2;
        for number in (0..600).filter(|it| ![5, 6].contains(it)) {
            assert!(run(&program, architecture, number, [0; 6]).1 <= most);
        }
    }
}
