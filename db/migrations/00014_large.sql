-- Large tables on their way in. Their rows are copied, typed, into a table beside the one in config. Where that one is empty the other
-- takes its place (swap), with indexes that were built once; else the rows that differ are brought over (merge), and only those of
-- buckets that differ are sent.
--
-- What a swap is sure of. The sender has summed the very text that it sent, row by row as node.sum_sql has it, and found its own kept sums;
-- these become the kept sums here. That the rows which lie here are the rows that were sent is checked before anyone can see them, by
-- two 64-bit sums over the text of every stored row (node.check_sql), or, where those differ, by the SHA-256 of every row.

-- +goose Up
-- stage makes the session's own tables: staging, as before, and beside, which says what this transaction has in tables of its own.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.stage() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $$
BEGIN
    IF to_regclass('pg_temp.staging') IS NULL THEN
        CREATE TEMPORARY TABLE staging (
            tab text NOT NULL COLLATE "C",
            op  text NOT NULL CHECK (op IN ('u', 'd')), -- put this row; delete the row with this key
            row jsonb NOT NULL
        ) ON COMMIT DELETE ROWS;
        GRANT INSERT ON pg_temp.staging TO mailproxy_push;
    END IF;
    IF to_regclass('pg_temp.beside') IS NULL THEN
        CREATE TEMPORARY TABLE beside (
            tab  text PRIMARY KEY COLLATE "C",
            rel  text NOT NULL,    -- the table in node
            swap boolean NOT NULL, -- it can take the place of the one in config
            n bigint, a numeric, b numeric, c numeric, d numeric, -- its sums, once all rows are there
            among text NOT NULL DEFAULT 'true' -- what is beside is the rows r for which this is true
        ) ON COMMIT DELETE ROWS;
    END IF;
    IF to_regclass('pg_temp.bucket') IS NULL THEN
        CREATE TEMPORARY TABLE bucket (
            bucket integer NOT NULL,
            n      bigint NOT NULL,
            x      numeric NOT NULL -- see node.buckets_sql
        ) ON COMMIT DELETE ROWS;
        CREATE TEMPORARY TABLE own_bucket (LIKE bucket) ON COMMIT DELETE ROWS;
        GRANT INSERT ON pg_temp.bucket TO mailproxy_push;
    END IF;
END $$;
-- +goose StatementEnd

-- beside_of gives the name of the table in node that holds what is coming in of a table; NULL where that is in the staging table.
-- +goose StatementBegin
CREATE FUNCTION node.beside_of(t text) RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (SELECT rel FROM pg_temp.beside WHERE tab = t);
END $$;
-- +goose StatementEnd

-- types gives the types of columns, NULL for one that is not there.
-- +goose StatementBegin
CREATE FUNCTION node.types(t text, cols text[]) RETURNS text[] LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(format_type(a.atttypid, a.atttypmod) ORDER BY c.i) FROM unnest(cols) WITH ORDINALITY c(col, i)
    LEFT JOIN pg_attribute a ON a.attrelid = format('config.%I', t)::regclass AND a.attname = c.col AND a.attnum > 0 AND NOT a.attisdropped
$$;
-- +goose StatementEnd

-- text_sql gives the query for the rows of a table as text, in the order of node.columns.
-- +goose StatementBegin
CREATE FUNCTION node.text_sql(t text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('SELECT %s FROM config.%I r', string_agg(format('r.%I::text', c), ', ' ORDER BY i), t)
    FROM unnest(node.columns(t)) WITH ORDINALITY x(c, i)
$$;
-- +goose StatementEnd

-- hash_sql gives the expression for a 64-bit hash of columns' text in a row r. It is cheap, and several processes can share it.
-- +goose StatementBegin
CREATE FUNCTION node.hash_sql(cols text[], seed integer) RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE x text := seed::text; col text;
BEGIN
    FOREACH col IN ARRAY cols LOOP
        x := format($q$hashtextextended(coalesce(r.%I::text COLLATE "C", E'\x01NULL'), %s)$q$, col, x);
    END LOOP;
    RETURN x;
END $$;
-- +goose StatementEnd

-- bucket_sql gives the expression for the bucket, of so many (a power of two), that a row r of a table is in by its key.
-- +goose StatementBegin
CREATE FUNCTION node.bucket_sql(t text, count integer) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('(%s & %s)::integer', node.hash_sql(node.key(t), 0), count - 1)
$$;
-- +goose StatementEnd

-- buckets_sql gives the query for (bucket, n, x) of a table: of each bucket the number of rows and the sum of their hashes.
-- +goose StatementBegin
CREATE FUNCTION node.buckets_sql(t text, cols text[], count integer) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('SELECT %s AS bucket, count(*) AS n, sum(%s) AS x FROM config.%I r GROUP BY 1', node.bucket_sql(t, count),
        node.hash_sql(cols, 1), t)
$$;
-- +goose StatementEnd

-- check_sql gives the query for (n, x, y): the number of rows of source and two sums of their hashes by different seeds.
-- +goose StatementBegin
CREATE FUNCTION node.check_sql(cols text[], source text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('SELECT count(*), coalesce(sum(%s), 0), coalesce(sum(%s), 0) FROM %s r', node.hash_sql(cols, 1), node.hash_sql(cols, 2), source)
$$;
-- +goose StatementEnd

-- index_head gives how the definition of an index begins, up to its method.
-- +goose StatementBegin
CREATE FUNCTION node.index_head(index oid) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('CREATE %sINDEX %I ON %s ', CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END, x.relname,
        format('%I.%I', t.relnamespace::regnamespace::text, t.relname))
    FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid WHERE i.indexrelid = index
$$;
-- +goose StatementEnd

-- plain says whether a table has nothing about it that a swap would not carry over.
-- +goose StatementBegin
CREATE FUNCTION node.plain(t text) RETURNS boolean LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.relkind = 'r' AND c.relpersistence = 'p' AND c.reloptions IS NULL AND NOT c.relrowsecurity AND NOT c.relispartition
        AND c.reltablespace = 0 AND c.relreplident = 'd' AND c.reloftype = 0
        AND NOT EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent))
        AND NOT EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = c.oid)
        AND NOT EXISTS (SELECT FROM pg_publication_rel p WHERE p.prrelid = c.oid)
        AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            AND (a.attacl IS NOT NULL OR a.attidentity <> '' OR a.attgenerated <> '' OR a.attoptions IS NOT NULL OR a.attstattarget >= 0))
        AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND (i.indisunique AND NOT i.indisprimary OR NOT i.indisvalid
            OR i.indisclustered OR left(pg_get_indexdef(i.indexrelid), length(node.index_head(i.indexrelid))) <> node.index_head(i.indexrelid)))
        AND NOT EXISTS (SELECT FROM pg_constraint o WHERE o.conrelid = c.oid AND o.contype NOT IN ('p', 'c', 'n'))
        AND NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = c.oid AND (g.tgisinternal OR g.tgenabled <> 'O'))
        -- what would have to be dropped with it: views, functions of its row type
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.deptype = 'n' AND (d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid
            OR d.refclassid = 'pg_type'::regclass AND d.refobjid IN (c.reltype, (SELECT y.typarray FROM pg_type y WHERE y.oid = c.reltype)))
            AND NOT (d.classid = 'pg_constraint'::regclass AND EXISTS (SELECT FROM pg_constraint o WHERE o.oid = d.objid AND o.conrelid = c.oid)))
    FROM pg_class c WHERE c.oid = format('config.%I', t)::regclass
$$;
-- +goose StatementEnd

-- begin_copy makes the table that the sender copies the rows of a large table into: these columns of these types. It says how that goes
-- on: by a swap, by the buckets that differ, or by all rows. The table lives as long as the transaction, and is nobody else's. Where the server
-- logs no more than it needs (wal_level), a new table's rows are not logged.
-- +goose StatementBegin
CREATE FUNCTION node.begin_copy(to_n bigint, cluster text, t text, cols text[], types text[], OUT rel text, OUT how text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE here text[]; swap boolean;
BEGIN
    PERFORM node.may_push(to_n, cluster);
    PERFORM node.stage();
    IF t NOT IN (SELECT node.tables()) THEN
        RAISE EXCEPTION 'no table config.% here', t USING ERRCODE = 'MP006';
    END IF;
    here := node.types(t, cols);
    IF array_position(here, NULL) IS NOT NULL THEN
        RAISE EXCEPTION 'no column % in config.% here', cols[array_position(here, NULL)], t USING ERRCODE = 'MP006';
    END IF;
    rel := format('in_%s_%s', pg_backend_pid(), format('config.%I', t)::regclass::oid);
    swap := here = types AND t <> 'epoch' AND node.plain(t) AND EXISTS (SELECT FROM node.digest k WHERE k.tab = t AND k.n = 0);
    -- Columns that the sender does not know stay NULL, so there are no defaults yet.
    IF swap THEN
        EXECUTE format('CREATE TABLE node.%I (LIKE config.%I INCLUDING CONSTRAINTS INCLUDING COMMENTS INCLUDING STORAGE INCLUDING COMPRESSION
            INCLUDING STATISTICS)', rel, t);
    ELSE
        EXECUTE format('CREATE UNLOGGED TABLE node.%I (LIKE config.%I)', rel, t);
    END IF;
    EXECUTE format('GRANT INSERT (%s) ON node.%I TO mailproxy_push', (SELECT string_agg(quote_ident(c), ', ') FROM unnest(cols) c), rel);
    INSERT INTO pg_temp.beside (tab, rel, swap) VALUES (t, rel, swap);
    how := CASE WHEN swap THEN 'swap' WHEN here = types AND node.columns(t) <@ cols THEN 'buckets' ELSE 'rows' END;
END $$;
-- +goose StatementEnd

-- sum_buckets sums this node's buckets of a table, while the sender sums its own. Nothing is known of how few they are, and all rows would
-- be sorted.
-- +goose StatementBegin
CREATE FUNCTION node.sum_buckets(t text, cols text[], count integer) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD' SET timezone = 'UTC' SET extra_float_digits = 1
SET bytea_output = 'hex' SET intervalstyle = 'postgres' SET work_mem = '32MB' SET enable_sort = off SET jit = off AS $$
BEGIN
    PERFORM node.caller('push');
    TRUNCATE pg_temp.bucket, pg_temp.own_bucket;
    EXECUTE 'INSERT INTO pg_temp.own_bucket ' || node.buckets_sql(t, cols, count);
END $$;
-- +goose StatementEnd

-- differing gives the buckets whose sums are not those that the sender has put into the bucket table; what will be beside is the rows
-- of these alone.
-- +goose StatementBegin
CREATE FUNCTION node.differing(t text, count integer) RETURNS integer[] LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE found integer[];
BEGIN
    PERFORM node.caller('push');
    SELECT coalesce(array_agg(coalesce(own.bucket, theirs.bucket)), '{}') INTO found FROM pg_temp.own_bucket own
        FULL JOIN pg_temp.bucket theirs ON theirs.bucket = own.bucket WHERE (own.n, own.x) IS DISTINCT FROM (theirs.n, theirs.x);
    UPDATE pg_temp.beside SET among = format('%s = ANY (%L::integer[])', node.bucket_sql(t, count), found) WHERE tab = t AND NOT swap;
    RETURN found;
END $$;
-- +goose StatementEnd

-- end_copy takes in that all rows of a table are there, with the sums and checks that the sender made of what it sent. Nobody waits for
-- it: what takes long is done here, before node.push holds anything.
-- +goose StatementBegin
CREATE FUNCTION node.end_copy(t text, cols text[], to_n bigint, to_a numeric, to_b numeric, to_c numeric, to_d numeric, to_x numeric, to_y numeric)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO, YMD' SET timezone = 'UTC' SET extra_float_digits = 1 SET bytea_output = 'hex' SET intervalstyle = 'postgres'
SET maintenance_work_mem = '64MB' AS $$
DECLARE s record; own record; source text;
BEGIN
    PERFORM node.caller('push');
    SELECT * INTO STRICT s FROM pg_temp.beside WHERE tab = t;
    source := format('node.%I', s.rel);
    EXECUTE format('REVOKE INSERT (%s) ON %s FROM mailproxy_push', (SELECT string_agg(quote_ident(c), ', ') FROM unnest(cols) c), source);
    IF NOT s.swap THEN
        RETURN; -- triggers sum what is merged
    END IF;
    UPDATE pg_temp.beside SET n = to_n, a = to_a, b = to_b, c = to_c, d = to_d WHERE tab = t;
    PERFORM node.build_indexes(t, s.rel);
    EXECUTE node.check_sql(cols, source) INTO own;
    IF own IS DISTINCT FROM ROW(to_n, to_x, to_y) THEN -- another version of PostgreSQL may hash otherwise
        EXECUTE node.sum_sql(t, source) INTO own;
        IF own IS DISTINCT FROM ROW(to_n, to_a, to_b, to_c, to_d) THEN
            RAISE EXCEPTION 'the rows of config.% are not those that were sent', t USING ERRCODE = 'MP004';
        END IF;
    END IF;
    -- What was not logged must go to disk: now, since at COMMIT it would be while readers wait.
    IF current_setting('wal_level') = 'minimal' AND (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        CHECKPOINT;
    END IF;
END $$;
-- +goose StatementEnd

-- build_indexes gives a table in node the indexes of a table of config, named after itself.
-- +goose StatementBegin
CREATE FUNCTION node.build_indexes(t text, rel text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE i record;
BEGIN
    FOR i IN SELECT x.indexrelid AS index, x.indisunique AS uniq FROM pg_index x WHERE x.indrelid = format('config.%I', t)::regclass LOOP
        EXECUTE format('CREATE %sINDEX %I ON node.%I %s', CASE WHEN i.uniq THEN 'UNIQUE ' ELSE '' END, rel || '_' || i.index, rel,
            substr(pg_get_indexdef(i.index), length(node.index_head(i.index)) + 1));
    END LOOP;
END $$;
-- +goose StatementEnd

-- swap_in puts the tables that wait for it in the place of the empty ones of config, and gives how many rows that were. Those whose old
-- rows somebody may still see, or that it cannot lock soon without anybody waiting behind it, it merges.
-- +goose StatementBegin
CREATE FUNCTION node.swap_in() RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $$
DECLARE s record; total bigint := 0; m bigint;
BEGIN
    FOR s IN SELECT * FROM pg_temp.beside WHERE swap AND NOT node.was_empty(tab) LOOP
        m := node.merge_instead(s.tab);
        total := total + m;
    END LOOP;
    IF NOT node.lock_swapped() THEN
        FOR s IN SELECT * FROM pg_temp.beside WHERE swap LOOP
            m := node.merge_instead(s.tab);
            total := total + m;
        END LOOP;
    END IF;
    FOR s IN SELECT * FROM pg_temp.beside WHERE swap LOOP
        PERFORM node.swap(s.tab, s.rel);
        UPDATE node.digest k SET n = s.n, a = s.a, b = s.b, c = s.c, d = s.d WHERE k.tab = s.tab;
        total := total + s.n;
    END LOOP;
    RETURN total;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.merge_instead(t text) RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE pg_temp.beside SET swap = false WHERE tab = t;
    RETURN node.merge(t, true);
END $$;
-- +goose StatementEnd

-- was_empty says whether a table of config is empty to everybody: to each snapshot that some session still reads by, where we may know.
-- To those it stays so after a swap, since the new rows are younger; rows that such a snapshot saw would be gone from it.
-- +goose StatementBegin
CREATE FUNCTION node.was_empty(t text) RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE there boolean;
BEGIN
    EXECUTE format('SELECT EXISTS (SELECT FROM config.%I)', t) INTO there;
    RETURN NOT there AND pg_has_role(current_user, 'pg_read_all_stats', 'MEMBER')
        AND NOT EXISTS (SELECT FROM pg_stat_activity s, node.digest k WHERE k.tab = t AND s.pid <> pg_backend_pid()
            AND s.datname = current_database() AND s.backend_type = 'client backend' AND age(s.backend_xmin) >= age(k.xmin));
END $$;
-- +goose StatementEnd

-- lock_swapped locks what is to be swapped, all or nothing, and without ever standing in the queue, where later readers would stand behind
-- it. It tries for a while.
-- +goose StatementBegin
CREATE FUNCTION node.lock_swapped() RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE t text; until timestamptz := clock_timestamp() + interval '2 seconds';
BEGIN
    LOOP
        BEGIN
            FOR t IN SELECT tab FROM pg_temp.beside WHERE swap ORDER BY tab LOOP
                EXECUTE format('LOCK TABLE config.%I IN ACCESS EXCLUSIVE MODE NOWAIT', t);
            END LOOP;
            RETURN true;
        EXCEPTION WHEN lock_not_available THEN
            IF clock_timestamp() > until THEN
                RETURN false;
            END IF;
            PERFORM pg_sleep(0.01);
        END;
    END LOOP;
END $$;
-- +goose StatementEnd

-- swap puts one table in the place of another, which is empty and locked: with its defaults, triggers, rights, owner, comment and the names
-- of its indexes.
-- +goose StatementBegin
CREATE FUNCTION node.swap(t text, rel text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old regclass := format('config.%I', t)::regclass;
    new regclass := format('node.%I', rel)::regclass;
    c pg_class; after text[]; do_ text;
BEGIN
    SELECT * INTO STRICT c FROM pg_class WHERE oid = old;
    after := ARRAY( -- what is said of the old one and done to the new one, once that has its name
        SELECT format('ALTER TABLE config.%I ADD CONSTRAINT %I PRIMARY KEY USING INDEX %I', t, k.conname, rel || '_' || k.conindid)
            FROM pg_constraint k WHERE k.conrelid = old AND k.contype = 'p'
        UNION ALL SELECT format('ALTER INDEX config.%I RENAME TO %I', rel || '_' || i.indexrelid, x.relname)
            FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = old AND NOT i.indisprimary
        UNION ALL SELECT format('COMMENT ON INDEX config.%I IS %L', x.relname, obj_description(x.oid, 'pg_class'))
            FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = old AND obj_description(x.oid, 'pg_class') IS NOT NULL
        UNION ALL SELECT format('COMMENT ON CONSTRAINT %I ON config.%I IS %L', k.conname, t, obj_description(k.oid, 'pg_constraint'))
            FROM pg_constraint k WHERE k.conrelid = old AND k.contype = 'p' AND obj_description(k.oid, 'pg_constraint') IS NOT NULL
        UNION ALL SELECT format('ALTER TABLE config.%I ALTER %I SET DEFAULT %s', t, a.attname, pg_get_expr(d.adbin, d.adrelid))
            FROM pg_attrdef d JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.adrelid, d.adnum) WHERE d.adrelid = old
        UNION ALL SELECT format('COMMENT ON TABLE config.%I IS %L', t, obj_description(old, 'pg_class'))
        UNION ALL SELECT format('ALTER TABLE config.%I OWNER TO %I', t, pg_get_userbyid(c.relowner))
        UNION ALL SELECT format('REVOKE ALL ON config.%I FROM %I', t, pg_get_userbyid(c.relowner)) WHERE c.relacl IS NOT NULL
        UNION ALL SELECT format('GRANT %s ON config.%I TO %s%s', x.privilege_type, t,
            CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END, CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
            FROM aclexplode(c.relacl) x
        UNION ALL (SELECT pg_get_triggerdef(g.oid) FROM pg_trigger g WHERE g.tgrelid = old ORDER BY g.tgname)
        UNION ALL SELECT format('COMMENT ON TRIGGER %I ON config.%I IS %L', g.tgname, t, obj_description(g.oid, 'pg_trigger'))
            FROM pg_trigger g WHERE g.tgrelid = old AND obj_description(g.oid, 'pg_trigger') IS NOT NULL);
    EXECUTE format('DROP TABLE config.%I', t);
    EXECUTE format('ALTER TABLE %s SET SCHEMA config', new);
    EXECUTE format('ALTER TABLE %s RENAME TO %I', new, t);
    FOREACH do_ IN ARRAY after LOOP
        EXECUTE do_;
    END LOOP;
END $$;
-- +goose StatementEnd

-- merge_beside makes the rows of config that what lies beside is about what that says, touching only rows that differ, and gives how many
-- that were.
-- +goose StatementBegin
CREATE FUNCTION node.merge_beside(t text, rel text, among text) RETURNS bigint LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET enable_nestloop = off SET enable_mergejoin = off SET work_mem = '32MB' AS $$
DECLARE
    keys text[] := node.key(t);
    cols text[] := node.columns(t);
    gone tid[]; m bigint;
BEGIN
    EXECUTE format('CREATE TEMPORARY TABLE changed ON COMMIT DROP AS SELECT theirs.%I IS NULL AS gone, own.at_ AS at, theirs AS row_
        FROM (SELECT r AS row_, r.ctid AS at_, %s FROM config.%I r WHERE %s) own FULL JOIN node.%I theirs ON %s
        WHERE (own.row_ *<> theirs) IS NOT FALSE', keys[1], (SELECT string_agg(format('r.%I', k), ', ') FROM unnest(keys) k), t, among, rel,
        (SELECT string_agg(format('own.%1$I = theirs.%1$I', k), ' AND ') FROM unnest(keys) k));
    SELECT array_agg(at) INTO gone FROM pg_temp.changed c WHERE c.gone;
    IF gone IS NOT NULL THEN
        EXECUTE format('DELETE FROM config.%I WHERE ctid = ANY ($1)', t) USING gone;
    END IF;
    EXECUTE format('INSERT INTO config.%I (%s) SELECT %s FROM pg_temp.changed WHERE NOT gone ON CONFLICT (%s) DO UPDATE SET %s', t,
        (SELECT string_agg(quote_ident(c), ', ') FROM unnest(cols) c),
        (SELECT string_agg(format('(row_).%I', c), ', ') FROM unnest(cols) c),
        (SELECT string_agg(quote_ident(k), ', ') FROM unnest(keys) k),
        (SELECT string_agg(format('%1$I = excluded.%1$I', c), ', ') FROM unnest(cols) c)); -- an equal key may read otherwise
    GET DIAGNOSTICS m = ROW_COUNT;
    DROP TABLE pg_temp.changed;
    EXECUTE format('DROP TABLE node.%I', rel);
    RETURN m + coalesce(cardinality(gone), 0);
END $$;
-- +goose StatementEnd

-- staged gives what is coming in of a table, to be put, as an item of FROM.
-- +goose StatementBegin
CREATE FUNCTION node.staged(t text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN rel IS NOT NULL THEN format('(SELECT * FROM node.%I)', rel)
        ELSE format('(SELECT r.* FROM pg_temp.staging s CROSS JOIN LATERAL jsonb_populate_record(NULL::config.%1$I, s.row) r
            WHERE s.tab = %1$L AND s.op = ''u'')', t) END
    FROM node.beside_of(t) rel
$$;
-- +goose StatementEnd

-- among gives the condition for the rows r of a table that what is coming in is about.
-- +goose StatementBegin
CREATE FUNCTION node.among(t text) RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce((SELECT among FROM pg_temp.beside WHERE tab = t), 'true');
END $$;
-- +goose StatementEnd

-- apply_staged makes config equal to the sender's at (n, owner, to_serial) with the given digest, from the staged rows: tables in
-- whole lose what was not sent. Own commits that are not on the sender's line go to the journal first. Swaps come last, since
-- readers wait from then on.
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
        IF t <> 'epoch' AND NOT EXISTS (SELECT FROM pg_temp.beside WHERE tab = t AND swap) THEN
            m := node.merge(t, t = ANY (whole));
            touched := touched + m;
        END IF;
    END LOOP;
    m := node.swap_in();
    touched := touched + m;
    PERFORM node.trim_history();
    -- Kept sums that were wrong before, since rows were changed with the triggers off, are still.
    IF cardinality(whole) > 0 AND node.kept_digest() <> to_digest THEN
        PERFORM node.recount_table(w) FROM unnest(whole) w;
    END IF;
    IF node.kept_digest() <> to_digest THEN
        RAISE EXCEPTION 'the rows differ after the push' USING ERRCODE = 'MP004';
    END IF;
    UPDATE node.position SET epoch_n = to_n, epoch_owner = to_owner, serial = to_serial, pushed_at = now(), applied_digest = to_digest,
        rewrites = rewrites + (cardinality(whole) > 0)::int, apply_xid = NULL, apply_at = NULL;
    PERFORM pg_notify('mailproxy', '');
END $$;
-- +goose StatementEnd

-- recount_table sets the kept sums of one table to what its rows say.
-- +goose StatementBegin
CREATE FUNCTION node.recount_table(t text) RETURNS void LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE node.digest k SET n = s.n, a = s.a, b = s.b, c = s.c, d = s.d FROM node.sum_rows(t) s WHERE k.tab = t
$$;
-- +goose StatementEnd

-- merge brings the rows of a table in that are staged or lie beside it, by primary key, and gives how many rows it changed. Plans that loop
-- over staging for each row are ruled out, since nothing is known of staging's size.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.merge(t text, whole boolean) RETURNS bigint LANGUAGE plpgsql
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
    IF node.beside_of(t) IS NOT NULL THEN
        RETURN node.merge_beside(t, rel, among) FROM pg_temp.beside WHERE tab = t;
    END IF;
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

-- differences_sql writes the differences of a table from what is coming in of it, as changes that made the own rows of those.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.differences_sql(t text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format($q$INSERT INTO node.journal_change (id, seq, tab, op, key, old, new)
        SELECT $1, $2 + row_number() OVER (), $3, CASE WHEN theirs.%2$I IS NULL THEN 'insert' WHEN own.%2$I IS NULL THEN 'delete' ELSE 'update' END,
            d.key, CASE WHEN theirs.%2$I IS NOT NULL THEN to_jsonb(theirs) - %5$L::text[] END,
            CASE WHEN own.%2$I IS NOT NULL THEN to_jsonb(own) - %5$L::text[] END
        FROM (SELECT * FROM config.%1$I r WHERE %8$s) own FULL JOIN %6$s theirs ON %3$s
        CROSS JOIN LATERAL (SELECT jsonb_build_object(%4$s) AS key) d
        WHERE (own *<> theirs) IS NOT FALSE AND NOT EXISTS (SELECT FROM %7$s c WHERE c.serial > $4 AND c.tab = $3 AND c.key = d.key)$q$,
        t, keys[1], (SELECT string_agg(format('own.%1$I = theirs.%1$I', k), ' AND ') FROM unnest(keys) k),
        (SELECT string_agg(format('%1$L, coalesce(own.%1$I, theirs.%1$I)', k), ', ') FROM unnest(keys) k), node.secrets(t),
        node.staged(t), node.staged('change'), node.among(t))
    FROM node.key(t) keys
$$;
-- +goose StatementEnd

-- set_aside moves to the journal the own commits that the sender's history lacks: not on its line, or another one in its place. Those
-- that were trimmed here count as well.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.set_aside(to_n bigint, to_owner integer, to_serial bigint, by_n bigint, by_owner integer) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE m bigint;
BEGIN
    EXECUTE format($q$WITH others AS MATERIALIZED (
        SELECT * FROM %s r
    ), own AS (
        SELECT serial, epoch_n, epoch_owner, at, who, node, command FROM config.history
        UNION SELECT serial, epoch_n, epoch_owner, at, who, node, command FROM node.trimmed
    ), aside AS (
        INSERT INTO node.journal (epoch_n, epoch_owner, serial, at, who, node, command, by_n, by_owner)
        SELECT h.epoch_n, h.epoch_owner, h.serial, h.at, h.who, h.node, h.command, $4, $5
        FROM own h LEFT JOIN others o ON (o.serial, o.epoch_n, o.epoch_owner) = (h.serial, h.epoch_n, h.epoch_owner)
        WHERE node.orphan(h.epoch_n, h.epoch_owner, h.serial, $1, $2, $3)
           OR o.serial IS NOT NULL AND (o.at, o.who, o.node, o.command) IS DISTINCT FROM (h.at, h.who, h.node, h.command)
        ORDER BY h.serial
        RETURNING id, serial, epoch_n, epoch_owner
    ), changes AS (
        INSERT INTO node.journal_change (id, seq, tab, op, key, old, new)
        SELECT a.id, c.seq, c.tab, c.op, c.key, c.old, c.new FROM aside a JOIN config.change c
            ON (c.serial, c.epoch_n, c.epoch_owner) = (a.serial, a.epoch_n, a.epoch_owner)
        UNION SELECT a.id, c.seq, c.tab, c.op, c.key, c.old, c.new FROM aside a JOIN node.trimmed_change c
            ON (c.serial, c.epoch_n, c.epoch_owner) = (a.serial, a.epoch_n, a.epoch_owner)
    ), moved AS (
        DELETE FROM node.trimmed t USING aside a WHERE (t.serial, t.epoch_n, t.epoch_owner) = (a.serial, a.epoch_n, a.epoch_owner)
    )
    SELECT count(*) FROM aside$q$, node.staged('history')) INTO m USING to_n, to_owner, to_serial, by_n, by_owner;
    RETURN m;
END $$;
-- +goose StatementEnd

GRANT EXECUTE ON FUNCTION node.begin_copy(bigint, text, text, text[], text[]),
    node.sum_buckets(text, text[], integer),
    node.differing(text, integer),
    node.end_copy(text, text[], bigint, numeric, numeric, numeric, numeric, numeric, numeric) TO mailproxy_push;
