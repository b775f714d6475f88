//! Lists: pages and filters, the same for every List call.
//!
//! A page token names the list (call, parents, filter, caller), the revision it is read at and how far
//! it was read. All pages of a list come from the view of that one revision, which is kept for a while
//! after each page: a list that is walked through misses nothing and shows nothing twice, whatever is
//! written meanwhile. When the view is gone the caller is told to begin again; it never gets a page of
//! another revision instead. What is not in the view (readiness, presence) is as of the page.

use super::{Api, auth};
use crate::error::{Error, FieldError};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_proto::api::Page;
use berth_proto::filter::Filter;
use berth_proto::ids::Revision;
use berth_server_core::view::View;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Items of a page when nothing is asked for.
const DEFAULT_SIZE: u32 = 100;
/// Items of a page at most.
const MAX_SIZE: u32 = 1000;
/// Bytes of a page at most: below the 4 MiB that gRPC clients take unless told otherwise. A page of
/// larger items is shorter, never empty.
const MAX_PAGE_BYTES: usize = 3 * 1024 * 1024;
/// Views kept for lists under way: each holds what was changed since, a few KiB a write.
const MAX_VIEWS: usize = 64;
/// How long a view is kept after the last page was read from it: a person may read a page meanwhile.
const KEEP: Duration = Duration::from_secs(300);

/// Views of lists that are being walked through.
#[derive(Default)]
pub struct Walked {
    views: BTreeMap<Revision, (Arc<View>, Instant)>,
}

impl Walked {
    fn keep(&mut self, view: &Arc<View>, now: Instant) {
        self.views.retain(|_, (_, used)| now.duration_since(*used) < KEEP);
        if !self.views.contains_key(&view.revision) && self.views.len() >= MAX_VIEWS {
            let oldest = self.views.iter().min_by_key(|(_, (_, used))| *used).map(|(r, _)| *r);
            self.views.retain(|revision, _| Some(*revision) != oldest);
        }
        self.views.insert(view.revision, (Arc::clone(view), now));
    }

    fn find(&self, revision: Revision, now: Instant) -> Option<Arc<View>> {
        let (view, used) = self.views.get(&revision)?;
        (now.duration_since(*used) < KEEP).then(|| Arc::clone(view))
    }
}

/// Where a list goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    revision: Revision,
    offset: u32,
    list: [u8; 8],
}

impl Token {
    fn text(self) -> String {
        let bytes =
            [&self.revision.0.to_be_bytes()[..], &self.offset.to_be_bytes(), &self.list].concat();
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn read(text: &str) -> Option<Self> {
        let bytes: [u8; 20] = URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
        let (revision, rest) = bytes.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<4>()?;
        Some(Self {
            revision: Revision(u64::from_be_bytes(*revision)),
            offset: u32::from_be_bytes(*offset),
            list: rest.try_into().ok()?,
        })
    }
}

/// Which list is asked for.
pub struct Asked<'a> {
    /// The call, e.g. `ListHosts`.
    pub call: &'static str,
    /// What the request names beside the page: namespace, deployment, host.
    pub parents: &'a [&'a str],
    /// Fields it can be filtered by.
    pub fields: &'static [&'static str],
}

/// One page of a list that is being read.
pub struct Listing {
    /// What it is read from.
    pub view: Arc<View>,
    filter: Filter,
    size: usize,
    offset: u32,
    list: [u8; 8],
    revision: Revision,
}

fn expired() -> Error {
    Error::Gone {
        reason: "PAGE_EXPIRED",
        message: "the list that page.page_token goes on with is no longer kept; list again from \
                  the beginning"
            .to_owned(),
    }
}

impl Api {
    /// Reads what the caller says of pages and filter.
    pub(super) fn listing(
        &self,
        caller: &auth::Caller,
        page: Option<&Page>,
        asked: &Asked<'_>,
    ) -> Result<Listing, Error> {
        let newest = self.0.ledger.view();
        let mut listing = begin(&newest, caller, page, asked)?;
        if listing.revision != newest.revision {
            let kept = self.0.walked.lock().find(listing.revision, Instant::now());
            listing.view = kept.ok_or_else(expired)?;
        }
        Ok(listing)
    }

    /// The same for what is only ever added to and not in the view (audit, alias moves): entries
    /// after [`Listing::revision`] are not of the list.
    pub(super) fn listing_of_log(
        &self,
        caller: &auth::Caller,
        page: Option<&Page>,
        asked: &Asked<'_>,
    ) -> Result<Listing, Error> {
        begin(&self.0.ledger.view(), caller, page, asked)
    }

    /// Cuts the page out of the whole list, and says how to go on.
    pub(super) fn page<K, M: Message>(
        &self,
        listing: Listing,
        all: Vec<K>,
        show: impl FnMut(K) -> M,
    ) -> (Vec<M>, String) {
        let (items, token) = listing.cut(all, show);
        if token.is_some() && listing.view.revision == listing.revision {
            self.0.walked.lock().keep(&listing.view, Instant::now());
        }
        (items, token.map(Token::text).unwrap_or_default())
    }
}

fn begin(
    newest: &Arc<View>,
    caller: &auth::Caller,
    page: Option<&Page>,
    asked: &Asked<'_>,
) -> Result<Listing, Error> {
    let page = page.cloned().unwrap_or_default();
    let mut problems = Vec::new();
    let mut wrong = |path: &str, message: String| {
        problems.push(FieldError { path: path.to_owned(), message });
    };
    let parsed = Filter::parse(&page.filter, asked.fields);
    if let Err(error) = &parsed {
        wrong("page.filter", error.to_string());
    }
    let understood = parsed.is_ok();
    let filter = parsed.unwrap_or_default();
    let list = name(newest, caller, &filter, asked);
    let token = if page.page_token.is_empty() {
        Some(Token { revision: newest.revision, offset: 0, list })
    } else {
        Token::read(&page.page_token)
    };
    match token {
        None => wrong("page.page_token", "is not one this server gave".to_owned()),
        Some(token) if understood && token.list != list => {
            wrong(
                "page.page_token",
                "belongs to another list: call, namespace, filter and caller must stay the same"
                    .to_owned(),
            );
        }
        Some(_) => {}
    }
    let Some(token) = token.filter(|_| problems.is_empty()) else {
        return Err(Error::Invalid(problems));
    };
    // Of a ledger that has gone on elsewhere (a restore): not kept here.
    if token.revision > newest.revision {
        return Err(expired());
    }
    let size = if page.page_size == 0 { DEFAULT_SIZE } else { page.page_size.min(MAX_SIZE) };
    Ok(Listing {
        view: Arc::clone(newest),
        filter,
        size: size as usize,
        offset: token.offset,
        list,
        revision: token.revision,
    })
}

/// A short name of the list, so that a token is good for the list it was made for only.
fn name(view: &View, caller: &auth::Caller, filter: &Filter, asked: &Asked<'_>) -> [u8; 8] {
    use sha2::Digest as _;
    let mut hash = sha2::Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text.as_bytes());
    };
    add(asked.call);
    for parent in asked.parents {
        add(parent);
    }
    add(&filter.to_string());
    add(&caller.subject);
    // What the caller sees depends on what it may.
    add(&format!("{:?}", caller.bindings));
    add(&view.epoch().0.to_string());
    let digest: [u8; 32] = hash.finalize().into();
    let mut short = [0; 8];
    short.copy_from_slice(&digest[..8]);
    short
}

impl Listing {
    /// The revision the list is read at.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether an item is of the list; see [`Filter::matches`].
    pub fn wants<'a>(&self, field: impl FnMut(&str) -> Option<&'a str>) -> bool {
        self.filter.matches(field)
    }

    fn cut<K, M: Message>(
        &self,
        all: Vec<K>,
        mut show: impl FnMut(K) -> M,
    ) -> (Vec<M>, Option<Token>) {
        let total = all.len();
        let mut items = Vec::new();
        let mut bytes = 0;
        for key in all.into_iter().skip(self.offset as usize).take(self.size) {
            let item = show(key);
            bytes += item.encoded_len();
            if bytes > MAX_PAGE_BYTES && !items.is_empty() {
                break;
            }
            items.push(item);
        }
        let next = self.offset.saturating_add(u32::try_from(items.len()).unwrap_or(u32::MAX));
        let more = (next as usize) < total;
        let token =
            more.then_some(Token { revision: self.revision, offset: next, list: self.list });
        (items, token)
    }
}

/// Entries of a log looked at for one page at most: a filter that hardly anything matches gives short
/// pages, and never holds anybody up.
const MAX_LOOKED: usize = 20_000;

/// A page of a log that is read from its newest entry backwards. Its token names the revision of the
/// last entry that was looked at, so that the next page goes on there whatever was written meanwhile.
pub struct LogPage<'a, M> {
    listing: &'a Listing,
    items: Vec<M>,
    bytes: usize,
    looked: usize,
    last: Option<Revision>,
    full: bool,
    ended: bool,
}

impl<'a, M: Message> LogPage<'a, M> {
    /// An empty page of a list.
    pub fn new(listing: &'a Listing) -> Self {
        Self {
            listing,
            items: Vec::new(),
            bytes: 0,
            looked: 0,
            last: None,
            full: false,
            ended: false,
        }
    }

    /// Whether more may be read for it.
    pub fn has_room(&self) -> bool {
        !self.full && !self.ended
    }

    /// Looks at the entry of a revision, `None` when the list does not want it; false: it is of the
    /// next page, as are all after it.
    pub fn take(&mut self, revision: Revision, item: Option<M>) -> bool {
        let bytes = item.as_ref().map_or(0, Message::encoded_len);
        let large = !self.items.is_empty() && self.bytes + bytes > MAX_PAGE_BYTES;
        if self.items.len() >= self.listing.size || self.looked >= MAX_LOOKED || large {
            self.full = true;
            return false;
        }
        self.looked += 1;
        self.last = Some(revision);
        self.bytes += bytes;
        self.items.extend(item);
        true
    }

    /// The log has no earlier entry.
    pub fn ended(&mut self) {
        self.ended = true;
    }

    /// The page, and how to go on.
    pub fn finish(self) -> (Vec<M>, String) {
        let before = self.last.filter(|_| self.full).map(|r| Revision(r.0.saturating_sub(1)));
        let next = before.map(|revision| Token { revision, offset: 0, list: self.listing.list });
        (self.items, next.map(Token::text).unwrap_or_default())
    }
}

/// An enum's name as filters write it: without its prefix.
pub fn word<'a>(name: &'a str, prefix: &str) -> &'a str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// The value of a label field of a filter.
pub fn label<'a>(labels: &'a BTreeMap<String, String>, field: &str) -> Option<&'a str> {
    labels.get(field.strip_prefix("labels.")?).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::api::ObjectMeta;

    const ASKED: Asked<'static> =
        Asked { call: "ListThings", parents: &["default"], fields: &["name"] };

    fn view(revision: u64) -> Arc<View> {
        let mut view = View::default();
        view.revision = Revision(revision);
        Arc::new(view)
    }

    fn named(n: u32) -> ObjectMeta {
        ObjectMeta { name: n.to_string(), ..ObjectMeta::default() }
    }

    fn caller() -> auth::Caller {
        auth::Caller { subject: "user/vera".into(), ..auth::Caller::default() }
    }

    #[test]
    fn pages_join_to_the_whole_list() {
        let newest = view(7);
        let (mut token, mut seen) = (String::new(), Vec::new());
        loop {
            let page = Page { page_size: 3, page_token: token, ..Page::default() };
            let listing = begin(&newest, &caller(), Some(&page), &ASKED).unwrap();
            assert_eq!(listing.revision(), Revision(7));
            let (items, next) = listing.cut((0..10).collect(), named);
            seen.extend(items.into_iter().map(|m| m.name));
            match next {
                Some(next) => token = next.text(),
                None => break,
            }
        }
        assert_eq!(seen, (0..10).map(|n: u32| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn a_token_is_good_for_its_own_list_only_and_every_problem_is_named() {
        let first = begin(&view(7), &caller(), None, &ASKED).unwrap();
        let token = Token { revision: first.revision, offset: 2, list: first.list }.text();
        let page = |filter: &str, token: &str| Page {
            page_size: 0,
            page_token: token.to_owned(),
            filter: filter.to_owned(),
        };
        let problems = |result: Result<Listing, Error>| match result {
            Err(Error::Invalid(fields)) => fields.into_iter().map(|f| f.path).collect::<Vec<_>>(),
            Err(other) => panic!("{other}"),
            Ok(_) => Vec::new(),
        };
        let try_with = |page: &Page, asked: &Asked<'_>, who: &auth::Caller| {
            problems(begin(&view(7), who, Some(page), asked))
        };
        assert!(try_with(&page("", &token), &ASKED, &caller()).is_empty());
        let wrong = vec!["page.page_token".to_owned()];
        assert_eq!(try_with(&page("name=x", &token), &ASKED, &caller()), wrong);
        let other = auth::Caller { subject: "user/otto".into(), ..caller() };
        assert_eq!(try_with(&page("", &token), &ASKED, &other), wrong);
        let elsewhere = Asked { parents: &["prod"], ..ASKED };
        assert_eq!(try_with(&page("", &token), &elsewhere, &caller()), wrong);
        assert_eq!(
            try_with(&page("nam=x", "nonsense"), &ASKED, &caller()),
            ["page.filter", "page.page_token"]
        );
    }

    #[test]
    fn a_token_of_a_later_ledger_says_to_list_again() {
        let first = begin(&view(7), &caller(), None, &ASKED).unwrap();
        let token = Token { revision: Revision(9), offset: 2, list: first.list }.text();
        let page = Page { page_token: token, ..Page::default() };
        let error = begin(&view(7), &caller(), Some(&page), &ASKED).err().unwrap();
        assert_eq!(
            (error.code(), error.reason().as_str()),
            (tonic::Code::OutOfRange, "PAGE_EXPIRED")
        );
    }

    #[test]
    fn views_are_kept_for_a_while_and_no_more_than_the_bound() {
        let (mut walked, start) = (Walked::default(), Instant::now());
        for n in 0..=MAX_VIEWS as u64 {
            walked.keep(&view(n), start + Duration::from_millis(n));
        }
        assert_eq!(walked.views.len(), MAX_VIEWS);
        assert!(walked.find(Revision(0), start).is_none(), "the one not used for longest goes");
        assert!(walked.find(Revision(1), start + Duration::from_secs(1)).is_some());
        assert!(walked.find(Revision(1), start + KEEP * 2).is_none());
    }

    #[test]
    fn a_page_of_large_items_is_shorter_and_never_empty() {
        let listing = begin(&view(1), &caller(), None, &ASKED).unwrap();
        let large = |_: u32| ObjectMeta { name: "x".repeat(MAX_PAGE_BYTES), ..Default::default() };
        let (items, token) = listing.cut((0..5).collect(), large);
        assert_eq!((items.len(), token.map(|t| t.offset)), (1, Some(1)));
    }
}
