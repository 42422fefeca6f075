"""The database's shape, as numbered steps. Append only: a step that has shipped is never edited.

`PRAGMA user_version` says how many steps a database has had. tests/ keeps a database of every version, and each must
still open.
"""

MIGRATIONS: tuple[str, ...] = (
    """
    -- The work. `state` is what its jobs show; `folder` is a name below the spool, NULL once the audio is gone.
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        uid INTEGER NOT NULL,
        state TEXT NOT NULL,
        share_key BLOB NOT NULL,       -- user, audio, options and model: equal keys are equal work
        folder TEXT,
        sha256 TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        options BLOB NOT NULL,         -- msgpack
        decoded INTEGER NOT NULL DEFAULT 0,
        audio_s REAL,
        truncated INTEGER NOT NULL DEFAULT 0,
        starts INTEGER NOT NULL DEFAULT 0,      -- how often the model began it; segments belong to a start
        segments INTEGER NOT NULL DEFAULT 0,    -- how many segments of this start are stored
        deaths INTEGER NOT NULL DEFAULT 0,      -- helper processes that died at it
        created_at REAL NOT NULL,
        ended_at REAL,
        audio_expires_at REAL                   -- when the audio of an ended run is deleted
    ) STRICT;
    CREATE INDEX runs_share_key ON runs (share_key);
    CREATE INDEX runs_live ON runs (state) WHERE state NOT IN ('done', 'failed', 'cancelled');
    CREATE INDEX runs_audio ON runs (audio_expires_at) WHERE audio_expires_at IS NOT NULL;

    -- Somebody's request. AUTOINCREMENT: an id is never used again, also after its row is gone.
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id INTEGER NOT NULL REFERENCES runs (id),
        uid INTEGER NOT NULL,
        state TEXT NOT NULL,
        priority TEXT NOT NULL,
        attached INTEGER NOT NULL,
        key TEXT,
        source BLOB NOT NULL,          -- msgpack
        options BLOB NOT NULL,         -- msgpack
        submitted_at REAL NOT NULL,
        started_at REAL,
        ended_at REAL,
        error_code TEXT,
        error_message TEXT,
        last_seq INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX jobs_run ON jobs (run_id);
    CREATE INDEX jobs_uid ON jobs (uid, id);
    CREATE INDEX jobs_ended ON jobs (ended_at) WHERE ended_at IS NOT NULL;

    -- Idempotency keys outlive their jobs' rows: `expires_at` is set when the row goes.
    CREATE TABLE keys (
        uid INTEGER NOT NULL,
        key TEXT NOT NULL,
        job_id INTEGER NOT NULL,
        fingerprint BLOB NOT NULL,
        expires_at REAL,
        PRIMARY KEY (uid, key)
    ) STRICT, WITHOUT ROWID;

    -- A segment is stored once a start of a run, however many jobs hold the run.
    CREATE TABLE segments (
        run_id INTEGER NOT NULL,
        start INTEGER NOT NULL,
        number INTEGER NOT NULL,
        payload BLOB NOT NULL,         -- msgpack
        PRIMARY KEY (run_id, start, number)
    ) STRICT, WITHOUT ROWID;

    -- What subscribers see, numbered a job. A segment event names its row in `segments`.
    CREATE TABLE events (
        job_id INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        kind TEXT NOT NULL,
        payload BLOB,                  -- msgpack; NULL for a segment
        start INTEGER,
        number INTEGER,
        PRIMARY KEY (job_id, seq)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE transcripts (
        run_id INTEGER PRIMARY KEY,
        payload BLOB NOT NULL          -- msgpack, as replies splice it
    ) STRICT;
    """,
    """
    -- Runs that begin with a download. Until it is there, `sha256` is empty and `share_key` equals `source_key`.
    ALTER TABLE runs ADD COLUMN source BLOB;            -- msgpack: what to download; NULL for a file
    ALTER TABLE runs ADD COLUMN source_key BLOB;        -- user, address, options and model: equal keys are equal work
    ALTER TABLE runs ADD COLUMN fresh INTEGER NOT NULL DEFAULT 0;   -- computed anew, whatever is known already
    ALTER TABLE runs ADD COLUMN fetch_failures INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN title TEXT;
    CREATE INDEX runs_source_key ON runs (source_key) WHERE source_key IS NOT NULL;
    """,
    """
    -- What a run has come to when it is cut off: the model's answers, as its helper packs them.
    CREATE TABLE journal (
        id INTEGER PRIMARY KEY,
        run_id INTEGER NOT NULL,
        entry BLOB NOT NULL
    ) STRICT;
    CREATE INDEX journal_run ON journal (run_id);
    ALTER TABLE runs ADD COLUMN made_by TEXT;           -- the model whose answers and segments these are
    ALTER TABLE runs ADD COLUMN edition INTEGER NOT NULL DEFAULT 0;   -- the start with which these segments began
    ALTER TABLE runs ADD COLUMN suspicion INTEGER NOT NULL DEFAULT 0; -- model processes that died in its presence
    UPDATE runs SET edition = starts;
    """,
    """
    -- Each minute those whose time is over are looked for: without this, in all of them (21 ms in 100,000).
    CREATE INDEX keys_expires ON keys (expires_at) WHERE expires_at IS NOT NULL;
    """,
)
