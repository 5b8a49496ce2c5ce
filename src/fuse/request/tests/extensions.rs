//! Tests of the extensions behind the names: labels and groups.

use super::*;
use crate::fuse::abi::InitFlags;

const LABEL: &[u8] = b"system_u:object_r:tmp_t:s0\0";

/// An extension of `kind` with `body`, padded with zeros.
fn record(kind: u32, body: &[&[u8]]) -> Vec<u8> {
    let mut bytes = body.concat();
    let len = (bytes.len() + 8).next_multiple_of(8);
    bytes.resize(len - 8, 0);
    let header = abi::ExtHeader {
        size: u32::try_from(len).unwrap(),
        kind,
    };
    [header.as_bytes(), &bytes].concat()
}

fn label_of(name: &[u8], value: &[u8]) -> Vec<u8> {
    let fixed = abi::Secctx {
        size: u32::try_from(value.len()).unwrap(),
        padding: 0,
    };
    record(1, &[fixed.as_bytes(), name, value])
}

fn label() -> Vec<u8> {
    label_of(b"security.selinux\0", LABEL)
}

fn groups(ids: &[u32]) -> Vec<u8> {
    let count = u32::try_from(ids.len()).unwrap();
    record(
        abi::EXT_GROUPS,
        &[count.to_ne_bytes().as_slice(), ids.as_bytes()],
    )
}

/// Each request that creates an inode, with these extensions, counted in the header or not.
fn creating_requests(extensions: &[u8], counted: bool) -> Vec<Vec<u8>> {
    let create = abi::CreateIn::default();
    let mut requests = vec![
        on_root(Opcode::Symlink, &[b"name\0", b"target\0", extensions]),
        on_root(
            Opcode::Mknod,
            &[abi::MknodIn::default().as_bytes(), b"name\0", extensions],
        ),
        on_root(
            Opcode::Mkdir,
            &[abi::MkdirIn::default().as_bytes(), b"name\0", extensions],
        ),
        on_root(Opcode::Create, &[create.as_bytes(), b"name\0", extensions]),
        on_root(Opcode::Tmpfile, &[create.as_bytes(), b"/\0", extensions]),
    ];
    if counted {
        let units = u16::try_from(extensions.len() / 8).unwrap();
        for request in &mut requests {
            request[36..38].copy_from_slice(&units.to_ne_bytes());
        }
    }
    requests
}

fn both() -> InitFlags {
    InitFlags::SECURITY_CTX | InitFlags::CREATE_SUPP_GROUP
}

fn extensions_of<'a>(request: &Request<'a>) -> (Option<(&'a CStr, &'a [u8])>, Option<u32>) {
    let label = match request.operation {
        Operation::Symlink { label, .. } => label,
        Operation::Mknod { new, .. }
        | Operation::Mkdir { new, .. }
        | Operation::Create { new, .. }
        | Operation::Tmpfile { new, .. } => new.label,
        other => panic!("{other:?}"),
    };
    let label = label.map(|label| (label.name, label.value));
    (label, request.caller.group)
}

#[test]
fn label_and_groups_are_accepted_in_either_order() {
    let expected = (Some((c"security.selinux", LABEL)), Some(2000));
    let none = record(0, &[]);
    for (extensions, expected) in [
        ([label(), groups(&[2000])].concat(), expected),
        ([groups(&[2000]), label()].concat(), expected),
        (label(), (expected.0, None)),
        (groups(&[2000]), (None, Some(2000))),
        ([none.clone(), groups(&[])].concat(), (None, None)),
        (none, (None, None)),
    ] {
        for bytes in creating_requests(&extensions, true) {
            assert_eq!(extensions_of(&decode_as(&bytes, both()).unwrap()), expected);
            // An extension that wasn't negotiated is ignored.
            assert_eq!(extensions_of(&decode(&bytes).unwrap()), (None, None));
            let labels = decode_as(&bytes, InitFlags::SECURITY_CTX).unwrap();
            assert_eq!(extensions_of(&labels), (expected.0, None));
            let groups = decode_as(&bytes, InitFlags::CREATE_SUPP_GROUP).unwrap();
            assert_eq!(extensions_of(&groups), (None, expected.1));
        }
    }
}

#[test]
fn label_without_padding_is_accepted() {
    // Linux before 6.3 doesn't pad it either.
    let mut odd = label();
    let len = 8 + 8 + b"security.selinux\0".len() + LABEL.len();
    odd.truncate(len);
    odd[..4].copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
    for extensions in [label(), odd] {
        for bytes in creating_requests(&extensions, false) {
            let request = decode_as(&bytes, InitFlags::SECURITY_CTX).unwrap();
            assert_eq!(
                extensions_of(&request).0,
                Some((c"security.selinux", LABEL))
            );
            let request = decode_as(&bytes, InitFlags::CREATE_SUPP_GROUP).unwrap();
            assert_eq!(extensions_of(&request), (None, None));
        }
    }
    // A request without extensions is valid too.
    for bytes in creating_requests(&[], false) {
        assert_eq!(
            extensions_of(&decode_as(&bytes, both()).unwrap()),
            (None, None)
        );
    }
}

#[test]
fn malformed_extensions_are_refused() {
    let sized = |mut record: Vec<u8>, size: u32| {
        record[..4].copy_from_slice(&size.to_ne_bytes());
        record
    };
    let fixed = |size: u32| abi::Secctx { size, padding: 0 };
    let two = |count: u32| record(abi::EXT_GROUPS, &[count.as_bytes(), &[0; 8]]);
    for extensions in [
        sized(label(), 0),
        sized(label(), 7),
        sized(label(), 1000),
        sized(label(), 16),
        sized(groups(&[1]), 8),
        [label(), label()].concat(),
        [groups(&[1]), groups(&[1])].concat(),
        groups(&[1, 2]),
        groups(&[u32::MAX]),
        two(0),
        two(u32::MAX),
        record(2, &[fixed(0).as_bytes(), b"security.a\0"]),
        record(1, &[fixed(100).as_bytes(), b"security.a\0"]),
        record(1, &[fixed(u32::MAX).as_bytes(), b"security.a\0"]),
        record(1, &[fixed(0).as_bytes(), b"security"]),
        label_of(b"user.a\0", b"value"),
        label_of(b"trusted.security.a\0", b"value"),
        label_of(b"\0", b"value"),
        record(1, &[]),
        record(33, &[]),
        record(u32::MAX, &[]),
        [label(), vec![0; 8]].concat(),
        vec![0; 8],
    ] {
        for bytes in creating_requests(&extensions, true) {
            let error = decode_as(&bytes, both()).expect_err("malformed");
            assert_eq!(error.errno(), Errno::INVAL, "{extensions:?}");
        }
    }
    for bytes in creating_requests(&label()[..30], false) {
        assert!(decode_as(&bytes, both()).is_err());
    }
}

#[test]
fn bytes_wanted_include_all_of_long_label() {
    let extensions = label_of(b"security.selinux\0", &[b'x'; 65_536]);
    for bytes in creating_requests(&extensions, true) {
        let wanted = bytes_wanted(&bytes[..HEADER_LEN], bytes.len() - HEADER_LEN);
        assert_eq!(wanted, Ok(bytes.len() - HEADER_LEN));
        let request = decode_as(&bytes, both()).unwrap();
        assert_eq!(
            extensions_of(&request).0.map(|(_, value)| value.len()),
            Some(65_536)
        );
    }
    for bytes in creating_requests(&label_of(b"security.selinux\0", &[b'x'; 70_000]), true) {
        assert_eq!(decode_as(&bytes, both()).unwrap_err().errno(), Errno::INVAL);
    }
}

proptest! {
    #[test]
    fn any_extensions_are_decoded_or_refused(
        bytes in prop::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..200),
        counted in any::<bool>(),
        flags in any::<u64>(),
    ) {
        for mut request in creating_requests(&bytes, false) {
            if counted {
                let units = u16::try_from(bytes.len() / 8).unwrap();
                request[36..38].copy_from_slice(&units.to_ne_bytes());
            }
            if let Ok(request) = decode_as(&request, InitFlags::from_bits(flags)) {
                check(&request);
            }
        }
    }

    #[test]
    fn any_change_of_good_extensions_is_decoded_or_refused(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
        swapped in any::<bool>(),
    ) {
        let mut records = [label(), groups(&[2000])];
        if swapped {
            records.reverse();
        }
        let mut extensions = records.concat();
        let at = at.index(extensions.len());
        extensions[at] = byte;
        extensions.truncate(cut.index(extensions.len() / 8 + 1) * 8);
        for bytes in creating_requests(&extensions, true) {
            match decode_as(&bytes, both()) {
                Ok(request) => check(&request),
                Err(error) => prop_assert_eq!(error.errno(), Errno::INVAL),
            }
        }
    }

    #[test]
    fn label_and_groups_survive_encoding(
        name in "security\\.[a-z.]{1,60}",
        value in prop::collection::vec(any::<u8>(), 0..300),
        group in 0..u32::MAX,
    ) {
        let name = std::ffi::CString::new(name).unwrap();
        let extensions = [label_of(name.as_bytes_with_nul(), &value), groups(&[group])].concat();
        for bytes in creating_requests(&extensions, true) {
            let request = decode_as(&bytes, both()).unwrap();
            prop_assert_eq!(extensions_of(&request), (Some((&*name, &*value)), Some(group)));
        }
    }
}
