-- Bringing in another node's rows: a push from the master, or the adoption of a newer configuration by a node that promotes itself.

-- +goose Up
-- The SQL that reads what a push sends, as (tab, op, row) of the staging table: whole tables, ...
-- +goose StatementBegin
CREATE FUNCTION node.whole_sql(tabs text[]) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(string_agg(format('SELECT %L, ''u'', to_jsonb(row_) FROM config.%I row_', tab, tab), ' UNION ALL '), 
        'SELECT '''', '''', NULL::jsonb WHERE false') FROM unnest(tabs) tab
$$;
-- +goose StatementEnd

-- ... or the rows that commits after a serial touched, as they are now, and those commits' history.
-- +goose StatementBegin
CREATE FUNCTION node.delta_sql(after_serial bigint) RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE q text; t text; upto bigint := (SELECT serial FROM node.position);
BEGIN
    q := format('SELECT ''history'', ''u'', to_jsonb(row_) FROM config.history row_ WHERE serial > %1$s AND serial <= %2$s
        UNION ALL SELECT ''change'', ''u'', to_jsonb(row_) FROM config.change row_ WHERE serial > %1$s AND serial <= %2$s', after_serial, upto);
    FOR t IN SELECT DISTINCT tab FROM config.change WHERE serial > after_serial AND serial <= upto AND tab IN (SELECT node.tables()) LOOP
        q := q || format(' UNION ALL SELECT %1$L, CASE WHEN row_.%4$I IS NULL THEN ''d'' ELSE ''u'' END, coalesce(to_jsonb(row_), k.key)
            FROM (SELECT DISTINCT key FROM config.change WHERE serial > %2$s AND serial <= %5$s AND tab = %1$L) k
            CROSS JOIN LATERAL jsonb_populate_record(NULL::config.%1$I, k.key) r LEFT JOIN config.%1$I row_ ON %3$s', t, after_serial,
            (SELECT string_agg(format('row_.%1$I = r.%1$I', c), ' AND ') FROM unnest(node.key(t)) c), (node.key(t))[1], upto);
    END LOOP;
    RETURN q;
END $$;
-- +goose StatementEnd

-- orphan says whether commit (n, owner, serial) is not on the line that ends at (to_n, to_owner, to_serial) and whose reigns are in
-- config.epoch. A single node has no reigns, and is its own line.
-- +goose StatementBegin
CREATE FUNCTION node.orphan(n bigint, owner integer, serial bigint, to_n bigint, to_owner integer, to_serial bigint) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT $3 > $6 OR (
        ($1, $2) <> ($4, $5) AND NOT EXISTS (SELECT FROM config.epoch e WHERE (e.n, e.owner) = ($1, $2))
        OR EXISTS (SELECT FROM config.epoch e WHERE (e.n, e.owner) > ($1, $2) AND e.first_serial <= $3))
$$;
-- +goose StatementEnd

-- can_delta says whether a node at the given position is behind on this node's own line, and the history reaches back to it.
-- +goose StatementBegin
CREATE FUNCTION node.can_delta(n bigint, owner integer, after_serial bigint) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT after_serial > 0 AND after_serial < p.serial
        AND NOT node.orphan(n, owner, after_serial, p.epoch_n, p.epoch_owner, p.serial)
        AND (SELECT count(*) FROM config.history WHERE serial > after_serial) = p.serial - after_serial
    FROM node.position p
$$;
-- +goose StatementEnd

-- begin_apply opens the guard for this transaction. Only functions of node call it.
-- +goose StatementBegin
CREATE FUNCTION node.begin_apply() RETURNS node.position LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE node.position SET apply_xid = pg_current_xact_id(), apply_at = transaction_timestamp() RETURNING *
$$;
-- +goose StatementEnd

-- stage makes the session's staging table, where rows on their way in lie until the transaction ends. It is temporary: unlogged, no
-- one else's, and empty again at no cost. A peer may not make temporary tables, so that one by this name is ours.
-- +goose StatementBegin
CREATE FUNCTION node.stage() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $$
BEGIN
    IF to_regclass('pg_temp.staging') IS NULL THEN
        CREATE TEMPORARY TABLE staging (
            tab text NOT NULL COLLATE "C",
            op  text NOT NULL CHECK (op IN ('u', 'd')), -- put this row; delete the row with this key
            row jsonb NOT NULL
        ) ON COMMIT DELETE ROWS;
        GRANT INSERT ON pg_temp.staging TO mailproxy_push;
    END IF;
END $$;
-- +goose StatementEnd

-- apply_staged makes config equal to the sender's at (n, owner, to_serial) with the given digest, from the staged rows: tables in
-- whole lose what was not sent. Own commits that are not on the sender's line go to the journal first.
-- +goose StatementBegin
CREATE FUNCTION node.apply_staged(to_n bigint, to_owner integer, to_serial bigint, to_digest bytea, whole text[], by_n bigint, by_owner integer,
    OUT journalled bigint, OUT touched bigint)
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
    journalled := 0;
    IF 'epoch' = ANY (staged) THEN
        touched := node.merge('epoch', 'epoch' = ANY (whole)); -- first: it is the sender's line
    END IF;
    IF 'history' = ANY (whole) THEN -- else it is the sender's but for what it adds, or the digest will differ
        journalled := node.set_aside(to_n, to_owner, to_serial, by_n, by_owner);
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
    UPDATE node.position SET epoch_n = to_n, epoch_owner = to_owner, serial = to_serial, pushed_at = now(),
        rewrites = rewrites + (cardinality(whole) > 0)::int, apply_xid = NULL, apply_at = NULL;
    PERFORM pg_notify('mailproxy', '');
END $$;
-- +goose StatementEnd

-- set_aside copies to the journal the own commits that the sender's history lacks: not on its line, or another one in its place.
-- +goose StatementBegin
CREATE FUNCTION node.set_aside(to_n bigint, to_owner integer, to_serial bigint, by_n bigint, by_owner integer) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE m bigint;
BEGIN
    WITH others AS MATERIALIZED (
        SELECT r.* FROM pg_temp.staging s CROSS JOIN LATERAL jsonb_populate_record(NULL::config.history, s.row) r WHERE s.tab = 'history'
    ), aside AS (
        INSERT INTO node.journal (epoch_n, epoch_owner, serial, at, who, node, command, by_n, by_owner)
        SELECT h.epoch_n, h.epoch_owner, h.serial, h.at, h.who, h.node, h.command, by_n, by_owner
        FROM config.history h LEFT JOIN others o ON (o.serial, o.epoch_n, o.epoch_owner) = (h.serial, h.epoch_n, h.epoch_owner)
        WHERE node.orphan(h.epoch_n, h.epoch_owner, h.serial, to_n, to_owner, to_serial)
           OR o.serial IS NOT NULL AND (o.at, o.who, o.node, o.command) IS DISTINCT FROM (h.at, h.who, h.node, h.command)
        ORDER BY h.serial
        RETURNING id, serial, epoch_n, epoch_owner
    ), changes AS (
        INSERT INTO node.journal_change SELECT a.id, c.seq, c.tab, c.op, c.key, c.old, c.new FROM aside a JOIN config.change c
            ON (c.serial, c.epoch_n, c.epoch_owner) = (a.serial, a.epoch_n, a.epoch_owner)
    )
    SELECT count(*) INTO m FROM aside;
    RETURN m;
END $$;
-- +goose StatementEnd

-- merge brings the staged rows of a table in by primary key, and gives how many rows it changed. Plans that loop over staging
-- for each row are ruled out, since nothing is known of staging's size.
-- +goose StatementBegin
CREATE FUNCTION node.merge(t text, whole boolean) RETURNS bigint LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    keys text[] := node.key(t);
    cols text[] := node.columns(t);
    match text := (SELECT string_agg(format('t.%1$I = r.%1$I', k), ' AND ') FROM unnest(keys) k);
    staged text := format('pg_temp.staging s CROSS JOIN LATERAL jsonb_populate_record(NULL::config.%1$I, s.row) r WHERE s.tab = %1$L', t);
    sets text := (SELECT string_agg(format('%1$I = excluded.%1$I', c), ', ') FROM unnest(cols) c); -- an equal key may read otherwise
    names text := (SELECT string_agg(quote_ident(c), ', ') FROM unnest(cols) c);
    total bigint; m bigint;
BEGIN
    IF whole THEN
        PERFORM set_config('enable_nestloop', 'off', true);
        EXECUTE format('DELETE FROM config.%I t WHERE NOT EXISTS (SELECT FROM %s AND s.op = ''u'' AND %s)', t, staged, match);
        PERFORM set_config('enable_nestloop', 'on', true);
    ELSE
        EXECUTE format('DELETE FROM config.%I t USING %s AND s.op = ''d'' AND %s', t, staged, match);
    END IF;
    GET DIAGNOSTICS total = ROW_COUNT;
    EXECUTE format('INSERT INTO config.%I AS t (%s) SELECT %s FROM %s AND s.op = ''u'' ON CONFLICT (%s) DO UPDATE SET %s WHERE t *<> excluded',
        t, names, (SELECT string_agg(format('r.%I', c), ', ') FROM unnest(cols) c), staged,
        (SELECT string_agg(quote_ident(k), ', ') FROM unnest(keys) k), sets);
    GET DIAGNOSTICS m = ROW_COUNT;
    RETURN total + m;
END $$;
-- +goose StatementEnd
