-- A PostgreSQL database made by version 1.1.0 from four loads, the second with a
-- bad record. Users of 2019-12-30 were deleted before the third. The fourth replaced
-- 2019-12-31.
CREATE TABLE public.active_user (
    date date NOT NULL,
    user_pseudo_id text NOT NULL
);
CREATE TABLE public.active_user_table (
    date date NOT NULL,
    active_user_count bigint NOT NULL
);
CREATE VIEW public.active_user_trend AS
 WITH visit AS (
         SELECT active_user.date,
            lead(active_user.date) OVER (PARTITION BY active_user.user_pseudo_id ORDER BY active_user.date) AS next
           FROM public.active_user
        ), stay AS (
         SELECT visit.date,
            COALESCE(((visit.date + '27 days'::interval))::date, '9999-12-31'::date) AS last,
            visit.next,
            count(*) AS users
           FROM visit
          GROUP BY visit.date, visit.next
        ), trend AS (
         SELECT day_1.date,
            day_1.active_user_count,
            (sum(
                CASE
                    WHEN (day_1.date >= ((stay.date + '7 days'::interval))::date) THEN (0)::bigint
                    ELSE stay.users
                END))::bigint AS weekly_active_users,
            (sum(stay.users))::bigint AS monthly_active_users
           FROM (stay
             CROSS JOIN public.active_user_table day_1)
          WHERE (((day_1.date >= stay.date) AND (day_1.date <= stay.last)) AND ((stay.next IS NULL) OR (day_1.date < stay.next)))
          GROUP BY day_1.date, day_1.active_user_count
        )
 SELECT day.date,
    day.active_user_count,
    trend.weekly_active_users,
    trend.monthly_active_users,
    round(((1.0 * (day.active_user_count)::numeric) / (trend.monthly_active_users)::numeric), 4) AS stickiness,
    (((day.date - ( SELECT min(active_user.date) AS min
           FROM public.active_user)) + 1))::bigint AS days,
    round((1.0 * ( SELECT avg(week.active_user_count) AS avg
           FROM public.active_user_table week
          WHERE ((week.date >= ((day.date + '-6 days'::interval))::date) AND (week.date <= day.date)))), 1) AS seven_day_average
   FROM (public.active_user_table day
     LEFT JOIN trend ON ((trend.date = day.date)));
CREATE TABLE public.load_log (
    load_id text NOT NULL,
    loaded_at text NOT NULL,
    seconds double precision DEFAULT 0 NOT NULL,
    sources text NOT NULL,
    bytes bigint DEFAULT 0 NOT NULL,
    timezone text NOT NULL,
    event_names text DEFAULT '["user_engagement"]'::text NOT NULL,
    min_engagement_msec bigint NOT NULL,
    valuable_events text NOT NULL,
    dates text DEFAULT ''::text NOT NULL,
    replaced bigint NOT NULL,
    lines bigint NOT NULL,
    blank_lines bigint NOT NULL,
    engagement_events bigint NOT NULL,
    active_events bigint NOT NULL,
    anonymous_events bigint NOT NULL,
    out_of_range_events bigint DEFAULT 0 NOT NULL,
    bad_records bigint NOT NULL,
    added bigint NOT NULL,
    removed bigint DEFAULT 0 NOT NULL,
    left_out bigint DEFAULT 0 NOT NULL
);
COMMENT ON TABLE public.load_log IS '2';
INSERT INTO public.active_user VALUES ('2020-01-01', 'a');
INSERT INTO public.active_user VALUES ('2020-01-01', 'e');
INSERT INTO public.active_user VALUES ('2019-12-31', 'd');
INSERT INTO public.active_user_table VALUES ('2019-12-30', 2);
INSERT INTO public.active_user_table VALUES ('2020-01-01', 2);
INSERT INTO public.active_user_table VALUES ('2019-12-31', 1);
INSERT INTO public.load_log VALUES ('9c6527bb004b676e', '2026-11-28T22:27:04Z', 0.04, '["a.jsons"]', 1111, 'US/Central', '["user_engagement"]', 3000, '["*_event"]', '2000-01-01..2026-11-29', 0, 5, 0, 5, 5, 1, 0, 0, 4, 0, 0);
INSERT INTO public.load_log VALUES ('fc59b3f63ccfa435', '2026-11-28T22:27:04Z', 0.013, '["b.jsons"]', 436, 'US/Central', '["user_engagement"]', 3000, '["*_event"]', '2000-01-01..2026-11-29', 0, 4, 1, 2, 2, 0, 1, 1, 1, 0, 0);
INSERT INTO public.load_log VALUES ('003106a352b402a8', '2026-11-28T22:27:04Z', 0.017, '["c.jsons"]', 669, 'US/Central', '["user_engagement"]', 3000, '["*_event"]', '2000-01-01..2026-11-29', 0, 3, 0, 3, 3, 0, 0, 0, 1, 0, 1);
INSERT INTO public.load_log VALUES ('265edb2398eda0ab', '2026-11-28T22:27:05Z', 0.036, '["c.jsons"]', 669, 'US/Central', '["user_engagement"]', 3000, '["*_event"]', '2019-12-31..2019-12-31', 1, 3, 0, 3, 3, 0, 0, 0, 0, 1, 1);
ALTER TABLE ONLY public.active_user
    ADD CONSTRAINT active_user_pkey PRIMARY KEY (date, user_pseudo_id);
ALTER TABLE ONLY public.active_user_table
    ADD CONSTRAINT active_user_table_pkey PRIMARY KEY (date);
ALTER TABLE ONLY public.load_log
    ADD CONSTRAINT load_log_pkey PRIMARY KEY (load_id);
