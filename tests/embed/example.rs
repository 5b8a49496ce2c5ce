//! The example of a VMM, as a test.

#[path = "../../integration/examples/small_vmm/main.rs"]
#[allow(dead_code, reason = "the program's `main`")]
mod small_vmm;

#[test]
fn guest_of_the_small_vmm_reads_and_writes_across_a_snapshot() {
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("from-the-host"), "hello\n").unwrap();
    small_vmm::run(share.path()).unwrap();
    let written = std::fs::read(share.path().join("from-the-guest")).unwrap();
    assert_eq!(
        written,
        b"written by the guest, before and after a snapshot\n"
    );
}
