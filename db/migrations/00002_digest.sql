-- Digests: a row's is the SHA-256 over "name=value NUL" of its columns that are not NULL, in the order of their names, values as
-- text under the settings that each function here fixes. A table's is the number of rows and the sums of the digests' four 64-bit
-- lanes, so it has no order and can be kept by adding and subtracting.

-- +goose Up
-- +goose StatementBegin
CREATE FUNCTION node.tables() RETURNS SETOF text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.relname::text FROM pg_class c
    WHERE c.relnamespace = 'config'::regnamespace AND c.relkind = 'r' ORDER BY c.relname COLLATE "C"
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.columns(t text) RETURNS text[] LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(a.attname::text ORDER BY a.attname COLLATE "C") FROM pg_attribute a
    WHERE a.attrelid = format('config.%I', t)::regclass AND a.attnum > 0 AND NOT a.attisdropped
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.key(t text) RETURNS text[] LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(a.attname::text ORDER BY k.i) FROM pg_index x
    CROSS JOIN LATERAL unnest(x.indkey::int2[]) WITH ORDINALITY k(attnum, i)
    JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
    WHERE x.indrelid = format('config.%I', t)::regclass AND x.indisprimary
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.secrets(t text) RETURNS text[] LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(a.attname::text ORDER BY a.attname COLLATE "C"), '{}') FROM pg_attribute a
    WHERE a.attrelid = format('config.%I', t)::regclass AND a.attnum > 0 AND NOT a.attisdropped
      AND col_description(a.attrelid, a.attnum) LIKE 'secret:%'
$$;
-- +goose StatementEnd

-- sum_sql gives the query for (n, a, b, c, d) of the rows of source, which has the columns of table t.
-- +goose StatementBegin
CREATE FUNCTION node.sum_sql(t text, source text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format($q$SELECT count(*) AS n,
  coalesce(sum(substring(h, 1, 64)::bit(64)::int8), 0) AS a, coalesce(sum(substring(h, 65, 64)::bit(64)::int8), 0) AS b,
  coalesce(sum(substring(h, 129, 64)::bit(64)::int8), 0) AS c, coalesce(sum(substring(h, 193, 64)::bit(64)::int8), 0) AS d
  FROM (SELECT ('x' || encode(sha256(%s), 'hex'))::bit(256) AS h FROM %s r OFFSET 0) x$q$,
        string_agg(format($q$coalesce(%L::bytea || convert_to(r.%I::text, 'UTF8') || '\x00'::bytea, ''::bytea)$q$, col || '=', col),
            ' || ' ORDER BY i), source)
    FROM unnest(node.columns(t)) WITH ORDINALITY c(col, i)
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.sum_rows(t text, OUT n bigint, OUT a numeric, OUT b numeric, OUT c numeric, OUT d numeric)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO, YMD' SET timezone = 'UTC' SET extra_float_digits = 1 SET bytea_output = 'hex' SET intervalstyle = 'postgres' AS $$
BEGIN
    EXECUTE node.sum_sql(t, format('config.%I', t)) INTO n, a, b, c, d;
END $$;
-- +goose StatementEnd

-- combine gives the digest of all tables from their sums; tables without rows do not count.
-- +goose StatementBegin
CREATE FUNCTION node.combine(sums node.digest[]) RETURNS bytea LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT sha256(convert_to(coalesce(
        string_agg(concat_ws(' ', s.tab, s.n, s.a, s.b, s.c, s.d), E'\n' ORDER BY s.tab COLLATE "C") FILTER (WHERE s.n <> 0), ''), 'UTF8'))
    FROM unnest(sums) s
$$;
-- +goose StatementEnd

-- kept_digest is cheap, from the kept sums; row_digest reads every row of config.
-- +goose StatementBegin
CREATE FUNCTION node.kept_digest() RETURNS bytea LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT node.combine(array_agg(k)) FROM node.digest k
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.row_digest() RETURNS bytea LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT node.combine(array_agg(ROW(t, s.n, s.a, s.b, s.c, s.d)::node.digest)) FROM node.tables() t, node.sum_rows(t) s
$$;
-- +goose StatementEnd

-- recount sets the kept sums to what the rows say. Rows that were changed with the triggers off show from then on.
-- +goose StatementBegin
CREATE FUNCTION node.recount() RETURNS bytea LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE node.position SET rewrites = rewrites + 1; -- holds off commits and pushes
    DELETE FROM node.digest WHERE tab NOT IN (SELECT node.tables());
    INSERT INTO node.digest SELECT t, s.* FROM node.tables() t, node.sum_rows(t) s
    ON CONFLICT (tab) DO UPDATE SET n = excluded.n, a = excluded.a, b = excluded.b, c = excluded.c, d = excluded.d;
    RETURN node.kept_digest();
END $$;
-- +goose StatementEnd
