//! What comes from C and what goes there. Only this module follows the caller's pointers.
//!
//! The header asks that a pointer is null or points to what it is documented to point to while the call lasts. Values of
//! the types here are made by C alone, as parameters of the exported functions, so that this is what they can rely on.

use std::ffi::{CStr, c_char};
use std::marker::PhantomData;
use std::sync::Arc;

use crate::status::{Failure, Result};

fn null(name: &str) -> Failure {
    Failure::argument(format!("{name} is null"))
}

fn misaligned(name: &str) -> Failure {
    Failure::argument(format!("{name} does not point to its type: the address is not aligned"))
}

/// A pointer to read from.
#[repr(transparent)]
pub struct In<'a, T>(*const T, PhantomData<&'a T>);

impl<T> Copy for In<'_, T> {}

impl<T> Clone for In<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<'a, T> In<'a, T> {
    pub const NULL: In<'a, T> = In(std::ptr::null(), PhantomData);

    fn check(self, name: &str) -> Result<*const T> {
        match self.0 {
            pointer if pointer.is_null() => Err(null(name)),
            pointer if !pointer.is_aligned() => Err(misaligned(name)),
            pointer => Ok(pointer),
        }
    }

    /// `len` elements; none may have any address.
    pub fn slice(self, len: usize, name: &str) -> Result<&'a [T]> {
        if len == 0 {
            return Ok(&[]);
        }
        let pointer = self.check(name)?;
        if len > isize::MAX as usize / size_of::<T>() {
            return Err(Failure::argument(format!("{name} cannot have {len} elements")));
        }
        // SAFETY: the caller vouches for `len` elements behind a pointer that is neither null nor misaligned (checked
        // above), and together they are no larger than an allocation can be.
        Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
    }
}

impl In<'static, u32> {
    /// A table for C to read, as long as its owner lives.
    pub fn of(table: &[u32]) -> In<'static, u32> {
        In(table.as_ptr(), PhantomData)
    }
}

impl<'a> In<'a, c_char> {
    /// `len` bytes.
    pub fn bytes(self, len: usize, name: &str) -> Result<&'a [u8]> {
        let chars = self.slice(len, name)?;
        // SAFETY: both types are one byte of any value; `char` has a sign on some machines.
        Ok(unsafe { std::slice::from_raw_parts(chars.as_ptr().cast(), chars.len()) })
    }

    /// `len` bytes of UTF-8.
    pub fn text(self, len: usize, name: &str) -> Result<&'a str> {
        std::str::from_utf8(self.bytes(len, name)?).map_err(|error| not_utf8(name, error.valid_up_to()))
    }

    /// UTF-8 that a NUL ends, or nothing.
    pub fn optional_string(self, name: &str) -> Result<Option<&'a str>> {
        if self.0.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller vouches for a NUL at the end of what is not null.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map(Some).map_err(|error| not_utf8(name, error.valid_up_to()))
    }

    /// UTF-8 that a NUL ends.
    pub fn string(self, name: &str) -> Result<&'a str> {
        self.optional_string(name)?.ok_or_else(|| null(name))
    }
}

fn not_utf8(name: &str, offset: usize) -> Failure {
    Failure::argument(format!("{name} is not valid UTF-8: the byte at offset {offset} does not belong to a character"))
}

/// A struct that may grow: `size_t struct_size` is its first field.
///
/// # Safety
/// The type is `repr(C)`, its first field is a `usize`, and any bits that C can write there are a value of it.
pub unsafe trait Versioned: Copy {
    /// As C calls it.
    const NAME: &str;
}

fn check_size<T: Versioned>(size: usize) -> Result<()> {
    if size == size_of::<T>() {
        return Ok(());
    }
    Err(Failure::argument(format!(
        "struct_size of {} is {size}, but must be {}: set it with the init function, and compile with the library's header",
        T::NAME,
        size_of::<T>()
    )))
}

/// `struct_size` behind a pointer that was checked against null and alignment.
fn read_size<T: Versioned>(pointer: *const T) -> usize {
    // SAFETY: such a struct begins with its size (`Versioned`), and nothing behind that is read yet.
    unsafe { pointer.cast::<usize>().read() }
}

impl<T: Versioned> In<'_, T> {
    /// The struct, once its size is known to be right.
    pub fn sized(self) -> Result<T> {
        let pointer = self.check(T::NAME)?;
        check_size::<T>(read_size(pointer))?;
        // SAFETY: the caller vouches for a struct of the size that it gives, which is this type's.
        Ok(unsafe { *pointer })
    }

    /// The same, or the defaults for null.
    pub fn sized_or_default(self) -> Result<T>
    where
        T: Default,
    {
        if self.0.is_null() { Ok(T::default()) } else { self.sized() }
    }
}

/// A pointer to write to.
#[repr(transparent)]
pub struct Out<'a, T>(*mut T, PhantomData<&'a mut T>);

impl<T> Copy for Out<'_, T> {}

impl<T> Clone for Out<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Out<'_, T> {
    pub fn check(self, name: &str) -> Result<*mut T> {
        In(self.0.cast_const(), PhantomData).check(name)?;
        Ok(self.0)
    }

    /// Writes one value.
    pub fn set(self, name: &str, value: T) -> Result<()> {
        let pointer = self.check(name)?;
        // SAFETY: the caller vouches for room behind a pointer that is neither null nor misaligned.
        unsafe { pointer.write(value) };
        Ok(())
    }

    /// Writes one value where there is a place for it.
    pub fn set_if_wanted(self, name: &str, value: T) -> Result<()> {
        if self.0.is_null() { Ok(()) } else { self.set(name, value) }
    }
}

impl<T: Copy> Out<'_, T> {
    /// Writes `values` to the start of `capacity` elements, which they must not exceed.
    pub fn fill(self, capacity: usize, name: &str, values: &[T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let pointer = self.check(name)?;
        if values.len() > capacity {
            return Err(Failure::buffer(name, values.len(), capacity));
        }
        // SAFETY: the caller vouches for `capacity` elements of room, there are no more values than that, and they are the
        // library's own memory.
        unsafe { pointer.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Ok(())
    }
}

impl<T: Versioned + Default> Out<'_, T> {
    /// Writes the defaults into a struct of `size` bytes.
    pub fn init(self, size: usize) -> Result<()> {
        check_size::<T>(size)?;
        self.set(T::NAME, T::default())
    }
}

impl<T: Versioned> Out<'_, T> {
    /// Writes a struct in the place of one whose size is set.
    pub fn replace(self, value: T) -> Result<()> {
        let pointer = self.check(T::NAME)?;
        check_size::<T>(read_size(pointer.cast_const()))?;
        self.set(T::NAME, value)
    }
}

/// What a handle may hold.
pub trait Kind: Send + Sync {
    /// Tells handles apart: of this kind, of another, freed.
    const COOKIE: u64;
    /// As C calls it.
    const NAME: &str;
}

/// What an opaque pointer of C points to. A call holds a share of the value, so that a callback may free the handle.
#[repr(C)]
pub struct Handle<T> {
    cookie: u64,
    value: Arc<T>,
}

impl<T: Kind> In<'_, Handle<T>> {
    /// The value of a handle that is not null, of this kind and, as far as can be seen, not freed.
    pub fn handle(self) -> Result<Arc<T>> {
        let pointer = self.check(T::NAME)?;
        // SAFETY: every handle begins with a cookie, whatever its kind.
        if unsafe { pointer.cast::<u64>().read() } != T::COOKIE {
            return Err(Failure::argument(format!("{0} is not a handle of {0}, or was freed", T::NAME)));
        }
        // SAFETY: the cookie says that it is a handle of this kind.
        Ok(unsafe { &*pointer }.value.clone())
    }
}

/// Where a new handle goes.
pub type Slot<'a, T> = Out<'a, *mut Handle<T>>;

impl<T: Kind> Slot<'_, T> {
    /// Sets it to null, for the case that nothing comes.
    pub fn cleared(self) -> Result<Self> {
        self.set(T::NAME, std::ptr::null_mut())?;
        Ok(self)
    }

    /// Hands `value` over to C.
    pub fn give(self, value: T) -> Result<()> {
        let pointer = self.check(T::NAME)?;
        let handle = Box::new(Handle { cookie: T::COOKIE, value: Arc::new(value) });
        // SAFETY: as in `set`.
        unsafe { pointer.write(Box::into_raw(handle)) };
        Ok(())
    }

    /// Frees what lies there and sets it to null. Null, on either level, is fine.
    pub fn free(self) -> Result<()> {
        if self.0.is_null() {
            return Ok(());
        }
        // SAFETY: the caller vouches for a handle, or null, behind a pointer that is not null.
        let pointer = unsafe { *self.check(T::NAME)? };
        if pointer.is_null() {
            return Ok(());
        }
        In(pointer.cast_const(), PhantomData).handle()?;
        self.set(T::NAME, std::ptr::null_mut())?;
        // SAFETY: the cookie says that `give` made it and that it was not freed. Written so that it stays written: a copy
        // of the pointer may be recognised by it.
        let handle = unsafe {
            (&raw mut (*pointer).cookie).write_volatile(0);
            Box::from_raw(pointer)
        };
        drop(handle);
        Ok(())
    }
}

/// Text with a NUL behind it. It may hold others.
pub struct CText(String);

impl Default for CText {
    fn default() -> Self {
        CText::from(String::new())
    }
}

impl From<String> for CText {
    fn from(mut text: String) -> Self {
        text.push('\0');
        CText(text)
    }
}

impl CText {
    /// Its start; it stays there when the `CText` moves.
    pub fn as_ptr(&self) -> *const c_char {
        self.0.as_ptr().cast()
    }

    /// Bytes without the NUL.
    pub fn len(&self) -> usize {
        self.0.len() - 1
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn as_bytes_with_nul(&self) -> &[u8] {
        self.0.as_bytes()
    }
}
