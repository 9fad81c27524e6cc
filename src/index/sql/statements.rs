//! The tables and every statement on them.
//!
//! `record` is a key's record; `version` repeats that of its text. `writing` has a row for each write under way: it is
//! the key's lock, the trace of the write and its fence. `debris` has the blobs that nobody writes and no record wants;
//! `gone`: all of them were deleted, and the row stays until `until`. `upload` has the multipart uploads under way and
//! `part` their parts, whose blobs are debris that rests. `session` has a row for each live master, and
//! `store` one row that all sessions touch when they begin; `verify` is the result of the last one. `format` is 0 while `rebuild` or `import` fills the store.
//!
//! Each statement is a transaction and touches a table at most once, so that the same text runs on CockroachDB. Keys
//! are bytea, which has no collation. Numbers are bigint, and times leave the database as seconds from its own `now()`:
//! no two clocks are compared.

macro_rules! grow {
    () => {
        " ON CONFLICT (key, version) DO UPDATE SET replicas = debris.replicas || ',' || excluded.replicas, gone = false,
            until = greatest(debris.until, excluded.until), wait = greatest(debris.wait, excluded.wait)"
    };
}

/// The write's own row, locked: without the lock the statement would see a row that a takeover has just deleted.
macro_rules! mine {
    () => {
        "mine AS (SELECT key FROM writing WHERE key = $1::bytea AND version = $2::bigint AND session = $3::bigint FOR UPDATE)"
    };
}

/// What is read of an entry: replicas, gone, seconds until `until` and until `wait`; the last is NULL if there is none.
macro_rules! entry {
    () => {
        "replicas, gone, ceil(extract(epoch FROM until - now()))::bigint,
            CASE WHEN wait = 'epoch' THEN NULL ELSE ceil(extract(epoch FROM wait - now()))::bigint END"
    };
}

pub static SCHEMA: [&str; 8] = [
    "CREATE TABLE IF NOT EXISTS session (id bigint PRIMARY KEY, beat bigint NOT NULL, name text NOT NULL, flags text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS record (key bytea PRIMARY KEY, version bigint NOT NULL, value text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS writing (key bytea, version bigint, session bigint NOT NULL, replicas text NOT NULL,
        PRIMARY KEY (key, version))",
    "CREATE TABLE IF NOT EXISTS debris (key bytea, version bigint, until timestamptz NOT NULL, wait timestamptz NOT NULL,
        gone boolean NOT NULL, replicas text NOT NULL, PRIMARY KEY (key, version))",
    "CREATE TABLE IF NOT EXISTS upload (id bigint PRIMARY KEY, key bytea NOT NULL, value text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS part (id bigint, number bigint, version bigint, value text NOT NULL,
        PRIMARY KEY (id, number, version))",
    "CREATE TABLE IF NOT EXISTS store (id bigint PRIMARY KEY, format bigint NOT NULL, opened bigint NOT NULL, verify text NOT NULL)",
    "INSERT INTO store (id, format, opened, verify) VALUES (1, 1, 0, '') ON CONFLICT (id) DO NOTHING",
];

pub static HAS_SCHEMA: &str = "SELECT EXISTS (SELECT 1 FROM information_schema.tables WHERE table_name = 'part' AND table_schema = current_schema())";
pub static FORMAT: &str = "SELECT format FROM store WHERE id = 1";

pub static VERIFY: &str = "SELECT verify FROM store WHERE id = 1";
pub static KEEP_VERIFY: &str = "UPDATE store SET verify = $1::text WHERE id = 1";

// Reading.
pub static GET: &str = "SELECT value FROM record WHERE key = $1::bytea";
pub static GET_MANY: &str = "SELECT key, value FROM record WHERE key = ANY($1::bytea[])";
pub static PAGE: &str = "SELECT key, value FROM record WHERE key >= $1::bytea ORDER BY key LIMIT $2::bigint";
pub static PAGE_BEFORE: &str =
    "SELECT key, value FROM record WHERE key >= $1::bytea AND key < $3::bytea ORDER BY key LIMIT $2::bigint";
pub static DEBRIS: &str = concat!(
    "SELECT version, ",
    entry!(),
    " FROM debris WHERE key = $1::bytea
     UNION ALL SELECT version, replicas, false, 0, NULL FROM writing WHERE key = $1 ORDER BY 1"
);
/// Without the writes under way and the parts of uploads.
pub static UNWANTED: &str = concat!(
    "SELECT version, ",
    entry!(),
    " FROM debris WHERE key = $1::bytea AND version NOT IN
       (SELECT p.version FROM part p, upload u WHERE p.id = u.id AND u.key = $1)
       AND version NOT IN (SELECT version FROM writing WHERE key = $1) ORDER BY version"
);
pub static ENTRY: &str = concat!("SELECT ", entry!(), " FROM debris WHERE key = $1::bytea AND version = $2::bigint");
pub static ALL_DEBRIS: &str = concat!(
    "SELECT * FROM (SELECT key, version, ",
    entry!(),
    " FROM debris
       UNION ALL SELECT key, version, replicas, false, 0, NULL FROM writing) e
     WHERE (key, version) > ($1::bytea, $2::bigint) ORDER BY key, version LIMIT $3::bigint"
);
pub static DUE: &str = concat!(
    "SELECT key, version, ",
    entry!(),
    " FROM debris
     WHERE wait <= now() AND NOT (gone AND until > now()) AND (key, version) > ($1::bytea, $2::bigint)
     ORDER BY key, version LIMIT $3::bigint"
);
/// What `rebalance` looks through: writes under way are not its business.
pub static DUE_LATER: &str = concat!(
    "SELECT key, version, ",
    entry!(),
    " FROM debris WHERE (key, version) > ($1::bytea, $2::bigint)
     ORDER BY key, version LIMIT $3::bigint"
);
pub static LEFT: &str = "SELECT count(*) FROM debris WHERE NOT gone AND wait <= now()";
pub static IS_EMPTY: &str = "SELECT NOT EXISTS (SELECT 1 FROM record) AND NOT EXISTS (SELECT 1 FROM debris)";
pub static ESTIMATE: &str = "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE relname = 'record'";

// Writing. $1 is the key, $2 the version and $3 the session, where a statement has them.

/// $4: whether a live record may be replaced. $5: whether other writers of the key may go on (R9).
pub static BEGIN: &str = "WITH r AS (SELECT version, value FROM record WHERE key = $1::bytea),
     d AS (SELECT max(version) AS v FROM debris WHERE key = $1),
     x AS (SELECT max(version) AS v FROM writing WHERE key = $1),
     w AS (INSERT INTO writing (key, version, session, replicas)
       SELECT $1, greatest((extract(epoch FROM clock_timestamp()) * 1000000)::bigint, (SELECT version FROM r) + 1,
           d.v + 1, x.v + 1), $2::bigint, $3::text FROM d, x
       WHERE ($4::boolean OR NOT EXISTS (SELECT 1 FROM r WHERE value NOT LIKE 'DELETED%'))
         AND ($5::boolean OR NOT EXISTS (SELECT 1 FROM writing WHERE key = $1))
         AND EXISTS (SELECT 1 FROM session WHERE id = $2)
       ON CONFLICT (key, version) DO NOTHING RETURNING version)
     SELECT (SELECT version FROM w), (SELECT value FROM r), EXISTS (SELECT 1 FROM session WHERE id = $2)";

/// Where there was no record. $5: the upload that has to be there, or 0. The answer: whether the row is still the write's, and whether the record was made.
pub static FLIP_NEW: &str = concat!(
    "WITH ",
    mine!(),
    ",
     r AS (INSERT INTO record (key, version, value) SELECT key, $2, $4::text FROM mine
       WHERE $5::bigint = 0 OR EXISTS (SELECT 1 FROM upload WHERE id = $5) ON CONFLICT (key) DO NOTHING RETURNING key),
     w AS (DELETE FROM writing WHERE key IN (SELECT key FROM r) AND version = $2 AND session = $3)
     SELECT EXISTS (SELECT 1 FROM mine), EXISTS (SELECT 1 FROM r)"
);

/// Where there was one, $5 and $6. $7: its replicas that become debris. $8: for how many seconds they are kept. $9: the
/// upload that has to be there, or 0.
pub static FLIP: &str = concat!(
    "WITH ", mine!(), ",
     r AS (UPDATE record SET version = $2, value = $4::text WHERE key IN (SELECT key FROM mine)
       AND version = $5::bigint AND value = $6::text
       AND ($9::bigint = 0 OR EXISTS (SELECT 1 FROM upload WHERE id = $9)) RETURNING key),
     w AS (DELETE FROM writing WHERE key IN (SELECT key FROM r) AND version = $2 AND session = $3),
     d AS (INSERT INTO debris (key, version, until, wait, gone, replicas)
       SELECT key, $5, 'epoch', CASE WHEN $8::bigint < 0 THEN 'epoch' ELSE now() + $8 * interval '1 second' END, false, $7::text
       FROM r WHERE $7 <> ''", grow!(), ")
     SELECT EXISTS (SELECT 1 FROM mine), EXISTS (SELECT 1 FROM r)"
);

/// A write that failed, or that of a dead master. $4: for how many seconds a 404 proves nothing.
pub static ABANDON: &str = concat!(
    "WITH w AS (DELETE FROM writing WHERE key = $1::bytea AND version = $2::bigint AND session = $3::bigint
       RETURNING key, version, replicas)
     INSERT INTO debris (key, version, until, wait, gone, replicas)
     SELECT key, version, now() + $4::bigint * interval '1 second', 'epoch', false, replicas FROM w",
    grow!()
);
pub static END: &str = "DELETE FROM writing WHERE key = $1::bytea AND version = $2::bigint AND session = $3::bigint";

/// A write whose BEGIN got no answer.
pub static UNDO: &str = "DELETE FROM writing WHERE key = $1::bytea AND session = $2::bigint";

/// Debris of a version that can be in no record any more.
pub static ADD: &str = concat!(
    "INSERT INTO debris (key, version, until, wait, gone, replicas)
     VALUES ($1::bytea, $2::bigint, now() + $3::bigint * interval '1 second', 'epoch', false, $4::text)",
    grow!()
);
/// $6: whether only a rebalance of the record keeps others from it (R9).
pub static DELETE: &str = concat!(
    "WITH r AS (DELETE FROM record WHERE key = $1::bytea AND version = $2::bigint AND value = $4::text
       AND NOT EXISTS (SELECT 1 FROM writing WHERE key = $1 AND (version = $2 OR NOT $6::boolean)) AND EXISTS (SELECT 1 FROM session WHERE id = $3::bigint)
       RETURNING key),
     d AS (INSERT INTO debris (key, version, until, wait, gone, replicas)
       SELECT key, $2, 'epoch', 'epoch', false, $5::text FROM r",
    grow!(),
    " RETURNING replicas)
     SELECT (SELECT replicas FROM d), EXISTS (SELECT 1 FROM session WHERE id = $3)"
);
pub static SET: &str =
    "WITH r AS (UPDATE record SET value = $5::text WHERE key = $1::bytea AND version = $2::bigint AND value = $4::text
       AND NOT EXISTS (SELECT 1 FROM writing WHERE key = $1 AND (version = $2 OR NOT $6::boolean)) AND EXISTS (SELECT 1 FROM session WHERE id = $3::bigint)
       RETURNING key)
     SELECT EXISTS (SELECT 1 FROM r), EXISTS (SELECT 1 FROM session WHERE id = $3)";
pub static CLAIM: &str = "INSERT INTO writing (key, version, session, replicas)
     SELECT $1::bytea, $2::bigint, $3::bigint, $4::text WHERE EXISTS (SELECT 1 FROM session WHERE id = $3)
       AND EXISTS (SELECT 1 FROM record WHERE key = $1 AND version = $2)
     ON CONFLICT (key, version) DO NOTHING RETURNING 1";

// Multipart uploads.
pub static CREATE_UPLOAD: &str = "INSERT INTO upload (id, key, value) VALUES ($1::bigint, $2::bytea, $3::text)
     ON CONFLICT (id) DO NOTHING";
pub static FIND_UPLOAD: &str = "SELECT value FROM upload WHERE id = $1::bigint";
pub static UPLOADS: &str = "SELECT id, value FROM upload WHERE id > $1::bigint ORDER BY id LIMIT $2::bigint";
pub static PARTS: &str = "SELECT number, value FROM part WHERE id = $1::bigint ORDER BY number, version";
pub static PART: &str = "SELECT 1 FROM part WHERE id = $1::bigint AND number = $2::bigint AND version = $3::bigint";
/// $4, $5, $6: the upload, the part's number and record. $7: for how many seconds its blob, on $8, rests.
pub static KEEP_PART: &str = concat!(
    "WITH ", mine!(), ",
     u AS (SELECT id FROM upload WHERE id = $4::bigint FOR UPDATE),
     p AS (INSERT INTO part (id, number, version, value) SELECT u.id, $5::bigint, $2, $6::text FROM mine, u RETURNING id),
     w AS (DELETE FROM writing WHERE key IN (SELECT key FROM mine) AND version = $2 AND session = $3
       AND EXISTS (SELECT 1 FROM p)),
     d AS (INSERT INTO debris (key, version, until, wait, gone, replicas)
       SELECT mine.key, $2, 'epoch', now() + $7::bigint * interval '1 second', false, $8::text FROM mine, p", grow!(), ")
     SELECT EXISTS (SELECT 1 FROM mine), EXISTS (SELECT 1 FROM p)"
);
pub static ADD_PART: &str = "INSERT INTO part (id, number, version, value)
     VALUES ($1::bigint, $2::bigint, $3::bigint, $4::text) ON CONFLICT (id, number, version) DO NOTHING";
pub static CLAIM_PART: &str = "WITH u AS (SELECT id FROM upload WHERE id = $5::bigint FOR UPDATE)
     INSERT INTO writing (key, version, session, replicas)
     SELECT $1::bytea, $2::bigint, $3::bigint, $4::text FROM u WHERE EXISTS (SELECT 1 FROM session WHERE id = $3)
       AND EXISTS (SELECT 1 FROM part WHERE id = $5 AND version = $2)
       AND EXISTS (SELECT 1 FROM debris WHERE key = $1 AND version = $2 AND wait > now())
     ON CONFLICT (key, version) DO NOTHING RETURNING 1";
pub static END_UPLOAD: &str = "DELETE FROM upload WHERE id = $1::bigint";
/// The blob of a part that is claimed rests on.
pub static END_PARTS: &str = "WITH p AS (DELETE FROM part WHERE id = $1::bigint RETURNING version)
     UPDATE debris SET wait = 'epoch' WHERE key = $2::bytea AND version IN (SELECT version FROM p)
       AND version NOT IN (SELECT version FROM writing WHERE key = $2)";

// Debris. $3 is the row's replicas as they were read: a row that has changed since is left alone.
pub static MARK: &str =
    "UPDATE debris SET until = greatest(until, now() + $4::bigint * interval '1 second'), gone = false
     WHERE key = $1::bytea AND version = $2::bigint AND replicas = $3::text RETURNING 1";
pub static GONE: &str =
    "UPDATE debris SET gone = true WHERE key = $1::bytea AND version = $2::bigint AND replicas = $3::text";
pub static FORGET: &str =
    "DELETE FROM debris WHERE key = $1::bytea AND version = $2::bigint AND replicas = $3::text AND gone = $4::boolean";
pub static SHRINK: &str =
    "UPDATE debris SET replicas = $4::text WHERE key = $1::bytea AND version = $2::bigint AND replicas = $3::text";
/// What answered 404 too early is asked again later.
pub static POSTPONE: &str = "UPDATE debris SET wait = now() + $4::bigint * interval '1 second'
     WHERE key = $1::bytea AND version = $2::bigint AND replicas = $3::text";

// Sessions.
pub static OPEN: &str = "WITH s AS (UPDATE store SET opened = opened + 1 WHERE id = 1 AND format = 1 RETURNING id)
     INSERT INTO session (id, beat, name, flags) SELECT $1::bigint, 0, $2::text, $3::text FROM s RETURNING 1";
pub static BEAT: &str = "UPDATE session SET beat = beat + 1 WHERE id = $1::bigint RETURNING 1";
pub static LOOK: &str = "SELECT id, beat, name, flags FROM session ORDER BY id";
pub static BURY: &str = "DELETE FROM session WHERE id = $1::bigint AND beat = $2::bigint RETURNING 1";
pub static CLOSE: &str = "DELETE FROM session WHERE id = $1::bigint";
pub static ORPHANS: &str = "SELECT key, version, session FROM writing w
     WHERE NOT EXISTS (SELECT 1 FROM session s WHERE s.id = w.session) LIMIT 100";
pub static STANDBYS: &str = "SHOW synchronous_standby_names";

// A bulk load.
pub static FILL: &str =
    "UPDATE store SET format = 0 WHERE id = 1 AND format = 1 AND NOT EXISTS (SELECT 1 FROM session) RETURNING 1";
pub static FILLED: &str = "UPDATE store SET format = 1 WHERE id = 1 AND format = 0";
pub static COPY: &str = "COPY record (key, version, value) FROM STDIN";
pub static PUT_DEBRIS: &str = "INSERT INTO debris (key, version, until, wait, gone, replicas)
     VALUES ($1::bytea, $2::bigint, now() + $3::bigint * interval '1 second',
       CASE WHEN $4::bigint < 0 THEN 'epoch' ELSE now() + $4 * interval '1 second' END, false, $5::text)
     ON CONFLICT (key, version) DO UPDATE SET replicas = excluded.replicas, gone = false, until = excluded.until,
       wait = excluded.wait";
pub static DROP_DEBRIS: &str = "DELETE FROM debris WHERE key = $1::bytea AND version = $2::bigint";
