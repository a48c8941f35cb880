-- Repair: rows that were changed behind the cluster's back go to the journal before they are overwritten, and an entry of the journal is
-- closed, never deleted.

-- +goose Up
-- The digest as the last push or adoption left it; NULL after a commit here. Where the kept one is another, rows were changed by hand.
ALTER TABLE node.position ADD COLUMN applied_digest bytea;
ALTER TABLE node.journal
    ADD COLUMN closed_at timestamptz,
    ADD COLUMN closed_by text,
    ADD COLUMN outcome   text CHECK (outcome IN ('applied', 'dropped')),
    ADD COLUMN reason    text;

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.take_serial() RETURNS node.position LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    UPDATE node.position SET serial = serial + 1, commit_xid = pg_current_xact_id(), commit_at = transaction_timestamp(), applied_digest = NULL
        WHERE (commit_xid, commit_at) IS DISTINCT FROM (pg_current_xact_id(), transaction_timestamp()) RETURNING * INTO p;
    IF NOT FOUND THEN
        SELECT * INTO STRICT p FROM node.position;
        RETURN p;
    END IF;
    INSERT INTO config.history (serial, epoch_n, epoch_owner, at, who, node, command)
        VALUES (p.serial, p.epoch_n, p.epoch_owner, clock_timestamp(),
            coalesce(nullif(current_setting('mailproxy.who', true), ''), session_user),
            coalesce(nullif(current_setting('mailproxy.node', true), '')::integer, p.cid),
            coalesce(current_setting('mailproxy.command', true), ''));
    PERFORM node.trim_history();
    PERFORM pg_notify('mailproxy', '');
    RETURN p;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.state(OUT cid integer, OUT cluster_id text, OUT epoch_n bigint, OUT epoch_owner integer, OUT serial bigint,
    OUT digest bytea, OUT promised_n bigint, OUT promised_owner integer, OUT pushed_at timestamptz, OUT journal_len integer,
    OUT rewrites bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.cid, p.cluster_id, p.epoch_n, p.epoch_owner, p.serial, node.kept_digest(), p.promised_n, p.promised_owner, p.pushed_at,
        (SELECT count(*)::int FROM node.journal WHERE closed_at IS NULL), p.rewrites FROM node.position p
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.apply_staged(to_n bigint, to_owner integer, to_serial bigint, to_digest bytea, whole text[], by_n bigint,
    by_owner integer, OUT journalled bigint, OUT touched bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE t text; m bigint; staged text[]; missing text;
BEGIN
    PERFORM node.stage();
    staged := ARRAY(SELECT DISTINCT tab FROM pg_temp.staging UNION SELECT unnest(whole));
    SELECT string_agg(s, ', ') INTO missing FROM unnest(staged) s WHERE s NOT IN (SELECT node.tables());
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'no table config.% here', missing USING ERRCODE = 'MP006';
    END IF;
    PERFORM node.begin_apply();
    touched := 0;
    journalled := node.set_aside_rows(whole, by_n, by_owner);
    IF 'epoch' = ANY (staged) THEN
        touched := node.merge('epoch', 'epoch' = ANY (whole)); -- first: it is the sender's line
    END IF;
    IF 'history' = ANY (whole) THEN -- else it is the sender's but for what it adds, or the digest will differ
        journalled := journalled + node.set_aside(to_n, to_owner, to_serial, by_n, by_owner);
    END IF;
    FOREACH t IN ARRAY staged LOOP
        IF t <> 'epoch' THEN
            m := node.merge(t, t = ANY (whole));
            touched := touched + m;
        END IF;
    END LOOP;
    PERFORM node.trim_history();
    IF node.kept_digest() <> to_digest THEN
        RAISE EXCEPTION 'the rows differ after the push' USING ERRCODE = 'MP004';
    END IF;
    UPDATE node.position SET epoch_n = to_n, epoch_owner = to_owner, serial = to_serial, pushed_at = now(), applied_digest = to_digest,
        rewrites = rewrites + (cardinality(whole) > 0)::int, apply_xid = NULL, apply_at = NULL;
    PERFORM pg_notify('mailproxy', '');
END $$;
-- +goose StatementEnd

-- set_aside_rows copies to the journal, as one entry, the rows that are about to be overwritten and that no commit has made so: what was
-- changed here with the triggers off. A row that a newer commit of the sender touched is that commit's.
-- +goose StatementBegin
CREATE FUNCTION node.set_aside_rows(whole text[], by_n bigint, by_owner integer) RETURNS bigint LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD' SET timezone = 'UTC' SET extra_float_digits = 1
SET bytea_output = 'hex' SET intervalstyle = 'postgres' SET enable_nestloop = off AS $$
DECLARE p node.position; t text; entry bigint; last bigint := 0; m bigint;
BEGIN
    SELECT * INTO STRICT p FROM node.position;
    IF p.applied_digest IS NULL OR p.applied_digest = node.kept_digest() THEN
        RETURN 0;
    END IF;
    INSERT INTO node.journal (epoch_n, epoch_owner, serial, at, who, node, command, by_n, by_owner)
        VALUES (p.epoch_n, p.epoch_owner, p.serial, clock_timestamp(), 'unknown', p.cid, '(rows changed by hand)', by_n, by_owner)
        RETURNING id INTO entry;
    FOREACH t IN ARRAY whole LOOP
        CONTINUE WHEN t IN ('history', 'change', 'epoch');
        EXECUTE node.differences_sql(t) USING entry, last, t, p.serial;
        GET DIAGNOSTICS m = ROW_COUNT;
        last := last + m;
    END LOOP;
    IF last = 0 THEN
        DELETE FROM node.journal WHERE id = entry;
        RETURN 0;
    END IF;
    RETURN 1;
END $$;
-- +goose StatementEnd

-- differences_sql writes the differences of a table from what is staged of it, as changes that made the own rows of the staged ones.
-- +goose StatementBegin
CREATE FUNCTION node.differences_sql(t text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format($q$INSERT INTO node.journal_change (id, seq, tab, op, key, old, new)
        SELECT $1, $2 + row_number() OVER (), $3, CASE WHEN theirs.%2$I IS NULL THEN 'insert' WHEN own.%2$I IS NULL THEN 'delete' ELSE 'update' END,
            d.key, CASE WHEN theirs.%2$I IS NOT NULL THEN to_jsonb(theirs) - %5$L::text[] END,
            CASE WHEN own.%2$I IS NOT NULL THEN to_jsonb(own) - %5$L::text[] END
        FROM config.%1$I own FULL JOIN (SELECT r.* FROM pg_temp.staging s
            CROSS JOIN LATERAL jsonb_populate_record(NULL::config.%1$I, s.row) r WHERE s.tab = %1$L AND s.op = 'u') theirs ON %3$s
        CROSS JOIN LATERAL (SELECT jsonb_build_object(%4$s) AS key) d
        WHERE (own *<> theirs) IS NOT FALSE AND NOT EXISTS (SELECT FROM pg_temp.staging c
            WHERE c.tab = 'change' AND (c.row->>'serial')::bigint > $4 AND c.row->>'tab' = $3 AND c.row->'key' = d.key)$q$,
        t, keys[1], (SELECT string_agg(format('own.%1$I = theirs.%1$I', k), ' AND ') FROM unnest(keys) k),
        (SELECT string_agg(format('%1$L, coalesce(own.%1$I, theirs.%1$I)', k), ', ') FROM unnest(keys) k), node.secrets(t))
    FROM node.key(t) keys
$$;
-- +goose StatementEnd

-- harden_database takes from everyone what belongs to the database as a whole; a copy of a database does not inherit it. What is
-- promised or committed is on disk, whatever the server's default.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.harden_database() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO mailproxy_peer, mailproxy_push', current_database());
    EXECUTE format('ALTER DATABASE %I SET synchronous_commit = %L', current_database(), 'on');
END $$;
-- +goose StatementEnd
