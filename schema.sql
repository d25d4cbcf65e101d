-- The database of load_active_users.py. It can also be made by hand: sqlite3 active_user_table.db < schema.sql

-- The table to plot. Always the count by date of active_user.
CREATE TABLE IF NOT EXISTS active_user_table (
    date DATE PRIMARY KEY NOT NULL,             -- YYYY-MM-DD, on the calendar of the rule's time zone
    active_user_count INTEGER NOT NULL
) WITHOUT ROWID;

-- Who was active on which date: what makes a load idempotent.
CREATE TABLE IF NOT EXISTS active_user (
    date DATE NOT NULL,
    user_pseudo_id TEXT NOT NULL,
    PRIMARY KEY (date, user_pseudo_id)
) WITHOUT ROWID;

-- One row a committed load.
CREATE TABLE IF NOT EXISTS load_log (
    loaded_at TEXT NOT NULL,                    -- UTC, YYYY-MM-DDTHH:MM:SSZ
    sources TEXT NOT NULL,                      -- JSON array of the EVENTS arguments
    timezone TEXT NOT NULL,                     -- the rule: the same in every row
    min_engagement_msec INTEGER NOT NULL,
    valuable_events TEXT NOT NULL,              -- JSON array of globs
    replaced INTEGER NOT NULL,                  -- 1 with --replace
    lines INTEGER NOT NULL,
    blank_lines INTEGER NOT NULL,
    engagement_events INTEGER NOT NULL,
    active_events INTEGER NOT NULL,
    anonymous_events INTEGER NOT NULL,          -- active events without a user_pseudo_id
    bad_records INTEGER NOT NULL,
    added INTEGER NOT NULL                      -- active users by date that were new to the table
);
