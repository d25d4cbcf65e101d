-- An SQLite database made by version 1.1.0 from four loads, the second with a
-- bad record. Users of 2019-12-30 were deleted before the third. The fourth replaced
-- 2019-12-31.
BEGIN TRANSACTION;
CREATE TABLE active_user (
    date DATE NOT NULL,
    user_pseudo_id TEXT NOT NULL,
    PRIMARY KEY (date, user_pseudo_id)
) WITHOUT ROWID;
INSERT INTO "active_user" VALUES('2019-12-31','d');
INSERT INTO "active_user" VALUES('2020-01-01','a');
INSERT INTO "active_user" VALUES('2020-01-01','e');
CREATE TABLE active_user_table (
    date DATE PRIMARY KEY NOT NULL,             -- YYYY-MM-DD, on the calendar of the rule's time zone
    active_user_count INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO "active_user_table" VALUES('2019-12-30',2);
INSERT INTO "active_user_table" VALUES('2019-12-31',1);
INSERT INTO "active_user_table" VALUES('2020-01-01',2);
CREATE TABLE load_log (
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
    left_out INTEGER NOT NULL DEFAULT 0         -- users by date that came too late for a final date
);
INSERT INTO "load_log" VALUES('8ec509a7e3e94b28','2026-11-28T22:27:02Z',0.004,'["a.jsons"]',1111,'US/Central','["user_engagement"]',3000,'["*_event"]','2000-01-01..2026-11-29',0,5,0,5,5,1,0,0,4,0,0);
INSERT INTO "load_log" VALUES('741083ec78770f9c','2026-11-28T22:27:02Z',0.003,'["b.jsons"]',436,'US/Central','["user_engagement"]',3000,'["*_event"]','2000-01-01..2026-11-29',0,4,1,2,2,0,1,1,1,0,0);
INSERT INTO "load_log" VALUES('03268b297b69f97b','2026-11-28T22:27:03Z',0.003,'["c.jsons"]',669,'US/Central','["user_engagement"]',3000,'["*_event"]','2000-01-01..2026-11-29',0,3,0,3,3,0,0,0,1,0,1);
INSERT INTO "load_log" VALUES('9e5a0f25cc78cbf8','2026-11-28T22:27:03Z',0.003,'["c.jsons"]',669,'US/Central','["user_engagement"]',3000,'["*_event"]','2019-12-31..2019-12-31',1,3,0,3,3,0,0,0,0,1,1);
CREATE VIEW active_user_trend AS
WITH visit AS (
    SELECT date, lead(date) OVER (PARTITION BY user_pseudo_id ORDER BY date) AS next FROM active_user
), stay AS (  -- from a visit until the user's next one, but 28 days at most: so each counts a user once a date
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
COMMIT;
PRAGMA user_version = 2;
