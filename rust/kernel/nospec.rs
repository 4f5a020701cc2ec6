// SPDX-License-Identifier: GPL-2.0

//! Bounds checks that hold under speculation.
//!
//! C header: [`include/linux/nospec.h`](srctree/include/linux/nospec.h).

use crate::bindings;

/// Returns `index` if it is less than `size`.
///
/// A CPU that mispredicts the outcome goes on with index 0. So whoever has chosen the index, a user
/// or a guest, cannot have it load from outside an array of `size` elements and leave a trace of
/// what was there.
///
/// # Examples
///
/// ```
/// use kernel::nospec::array_index;
///
/// assert_eq!(array_index(3, 4), Some(3));
/// assert_eq!(array_index(4, 4), None);
/// assert_eq!(array_index(usize::MAX, 4), None);
/// assert_eq!(array_index(0, 0), None);
/// ```
#[inline]
pub fn array_index(index: usize, size: usize) -> Option<usize> {
    if index >= size {
        return None;
    }
    // SAFETY: It only computes.
    Some(unsafe { bindings::array_index_nospec(index, size) })
}
