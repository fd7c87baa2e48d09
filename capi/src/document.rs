//! Documents.

use std::ffi::c_char;

use gleaner::Document;

use crate::args::{Handle, In, Kind, Out, Slot};
use crate::status::{Status, call, pointer};

impl Kind for Document {
    const COOKIE: u64 = u64::from_ne_bytes(*b"gleanDOC");
    const NAME: &str = "gleaner_document";
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_document_open(path: In<c_char>, document: Slot<Document>) -> Status {
    call(|| document.cleared()?.give(Document::open(path.string("path")?)?))
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_document_from_text(
    name: In<c_char>,
    text: In<c_char>,
    length: usize,
    document: Slot<Document>,
) -> Status {
    call(|| {
        let slot = document.cleared()?;
        let name = name.optional_string("name")?.unwrap_or("the document");
        slot.give(Document::from_bytes(name, text.bytes(length, "text")?.to_vec())?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_document_free(document: Slot<Document>) -> Status {
    call(|| document.free())
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_document_text(document: In<Handle<Document>>, length: Out<usize>) -> *const c_char {
    pointer(document.handle(), |document| {
        length.set("length", document.text().len())?;
        Ok(document.text().as_ptr().cast())
    })
}
