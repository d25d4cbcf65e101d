-- The tables of load_active_users.py, in SQLite's dialect:
--
--     sqlite3 active_user_table.db < schema.sql
--
-- The loader creates them itself. For PostgreSQL it translates INTEGER, REAL, WITHOUT ROWID,
-- DROP VIEW, CREATE VIEW, date(x, '+n days') and julianday(x). A column that was added after
-- version 1.0.0 is NOT NULL and has a DEFAULT, so that older tables can get it.

-- The table to plot: how many users active_user holds on each date. A date whose users were
-- deleted keeps its count.
CREATE TABLE IF NOT EXISTS active_user_table (
    date DATE PRIMARY KEY NOT NULL,             -- YYYY-MM-DD, on the calendar of the rule's time zone
    active_user_count INTEGER NOT NULL
) WITHOUT ROWID;

-- Who was active on which date. It makes loads idempotent.
CREATE TABLE IF NOT EXISTS active_user (
    date DATE NOT NULL,
    user_pseudo_id TEXT NOT NULL,
    PRIMARY KEY (date, user_pseudo_id)
) WITHOUT ROWID;

-- One row per committed load. A run with --commit-every has one row, which each commit updates.
CREATE TABLE IF NOT EXISTS load_log (
    load_id TEXT PRIMARY KEY NOT NULL,          -- random
    loaded_at TEXT NOT NULL,                    -- UTC, YYYY-MM-DDTHH:MM:SSZ
    seconds REAL NOT NULL DEFAULT 0,            -- from the start of the run to the commit
    sources TEXT NOT NULL,                      -- JSON array of the EVENTS, without passwords and queries
    bytes INTEGER NOT NULL DEFAULT 0,           -- read of the sources, compressed as they are
    timezone TEXT NOT NULL,                     -- the rule: the same in every row
    event_names TEXT NOT NULL DEFAULT '["user_engagement"]',  -- JSON array
    min_engagement_msec INTEGER NOT NULL,
    valuable_events TEXT NOT NULL,              -- JSON array of globs
    dates TEXT NOT NULL DEFAULT '',             -- FROM..TO, those that counted
    replaced INTEGER NOT NULL,                  -- 1 with --replace
    lines INTEGER NOT NULL,
    blank_lines INTEGER NOT NULL,
    engagement_events INTEGER NOT NULL,
    active_events INTEGER NOT NULL,
    anonymous_events INTEGER NOT NULL,          -- active events without a user_pseudo_id
    out_of_range_events INTEGER NOT NULL DEFAULT 0,  -- active events on none of the dates
    bad_records INTEGER NOT NULL,
    added INTEGER NOT NULL,                     -- users by date that were new to the table
    removed INTEGER NOT NULL DEFAULT 0,         -- users by date that --replace took out of it
    left_out INTEGER NOT NULL DEFAULT 0,        -- users by date that came too late for a final date
    skipped_files INTEGER NOT NULL DEFAULT 0    -- files that --incremental did not read again
);

-- One row per file or URL that a committed load has read, for --incremental. A later load
-- of the file brings it up to date. To load everything again, delete the rows.
CREATE TABLE IF NOT EXISTS loaded_file (
    path TEXT PRIMARY KEY NOT NULL,             -- absolute, or a URL without its query; non-ASCII as \u....
    version TEXT NOT NULL,                      -- size in bytes, and modification time in ns or ETag
    loaded_at TEXT NOT NULL,                    -- UTC, YYYY-MM-DDTHH:MM:SSZ
    load_id TEXT NOT NULL,                      -- of load_log
    first_date DATE NOT NULL,                   -- the dates that counted in that load
    last_date DATE                              -- NULL: up to the day after the load
) WITHOUT ROWID;

-- The trend, for each date of active_user_table:
--   active_user_count     users on the date
--   weekly_active_users   users in the 7 days that end on the date
--   monthly_active_users  users in the 28 days that end on the date
--   stickiness            active_user_count divided by monthly_active_users
--   days                  days from the first user to the date: the weekly number is complete
--                         from 7 on, the monthly one from 28 on
--   seven_day_average     the average count of those of the 7 days that have a count
DROP VIEW IF EXISTS active_user_trend;
CREATE VIEW active_user_trend AS
WITH visit AS (
    SELECT date, lead(date) OVER (PARTITION BY user_pseudo_id ORDER BY date) AS next FROM active_user
), stay AS (  -- from a visit to the user's next one, at most 28 days: one stay a date and user
    SELECT date, coalesce(date(date, '+27 days'), '9999-12-31') AS last, next, count(*) AS users
    FROM visit GROUP BY date, next
), trend AS (
    SELECT day.date, day.active_user_count,
        CAST(sum(CASE WHEN day.date >= date(stay.date, '+7 days') THEN 0 ELSE users END) AS INTEGER) AS weekly_active_users,
        CAST(sum(users) AS INTEGER) AS monthly_active_users
    FROM stay CROSS JOIN active_user_table AS day
    WHERE day.date BETWEEN stay.date AND stay.last AND (next IS NULL OR day.date < next)
    GROUP BY day.date, day.active_user_count
)
SELECT day.date, day.active_user_count, weekly_active_users, monthly_active_users,
    round(1.0 * day.active_user_count / monthly_active_users, 4) AS stickiness,
    CAST(julianday(day.date) - julianday((SELECT min(date) FROM active_user)) + 1 AS INTEGER) AS days,
    round(1.0 * (
        SELECT avg(week.active_user_count) FROM active_user_table AS week
        WHERE week.date BETWEEN date(day.date, '-6 days') AND day.date
    ), 1) AS seven_day_average
FROM active_user_table AS day LEFT JOIN trend ON trend.date = day.date;
