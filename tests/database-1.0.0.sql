-- A database made by version 1.0.0 from two loads, the second with a bad record.
BEGIN TRANSACTION;
CREATE TABLE active_user (
    date DATE NOT NULL,
    user_pseudo_id TEXT NOT NULL,
    PRIMARY KEY (date, user_pseudo_id)
) WITHOUT ROWID;
INSERT INTO "active_user" VALUES('2019-12-30','a');
INSERT INTO "active_user" VALUES('2019-12-30','b');
INSERT INTO "active_user" VALUES('2019-12-31','c');
CREATE TABLE active_user_table (
    date DATE PRIMARY KEY NOT NULL,             -- YYYY-MM-DD, on the calendar of the rule's time zone
    active_user_count INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO "active_user_table" VALUES('2019-12-30',2);
INSERT INTO "active_user_table" VALUES('2019-12-31',1);
CREATE TABLE load_log (
    load_id TEXT PRIMARY KEY NOT NULL,          -- random
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
INSERT INTO "load_log" VALUES('4dc295cb164d94d3','2026-11-25T01:56:52Z','["a.jsons"]','US/Central',3000,'["*_event"]',0,3,0,3,3,1,0,2);
INSERT INTO "load_log" VALUES('44c008bebdff17ea','2026-11-25T01:56:52Z','["b.jsons"]','US/Central',3000,'["*_event"]',0,4,1,2,2,0,1,1);
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
SELECT date, active_user_count, weekly_active_users, monthly_active_users,
    round(1.0 * active_user_count / monthly_active_users, 4) AS stickiness,
    CAST(julianday(date) - julianday((SELECT min(date) FROM active_user_table)) + 1 AS INTEGER) AS days
FROM trend;
COMMIT;
