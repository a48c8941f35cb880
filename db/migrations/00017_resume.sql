-- A push that breaks goes on where it was. A large table's rows that take long to come are committed on the way, in a table beside the one in
-- config: one a table, this node's alone, and nobody reads it. They are the first so many of the sender's, in the order in which it reads
-- them. The next push compares them with its first ones by sums of buckets, drops those that are not, or no longer, the same, and sends these
-- and the rest. Whose they were does not count: what they are does.
--
-- What is kept is never swapped in itself: whoever reads by a snapshot from before the swap would see rows that were committed before it.
-- The last transaction copies it into a table of its own, and goes on as if all had come in that.

-- +goose Up
CREATE TABLE node.kept (
    tab   text PRIMARY KEY COLLATE "C",
    rel   text NOT NULL,   -- the table in node
    cols  text[] NOT NULL, -- the columns that were sent, ...
    types text[] NOT NULL, -- ... their types at the sender ...
    here  text[] NOT NULL, -- ... and here
    upto  bigint NOT NULL  -- they are of so many of the sender's first rows
);

-- hold_kept makes this session the one whose push fills the tables that are kept, until it ends or a push is applied. Another one may be
-- about to notice that its sender is gone.
-- +goose StatementBegin
CREATE FUNCTION node.hold_kept() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE until timestamptz := clock_timestamp() + interval '5 seconds';
BEGIN
    WHILE NOT pg_try_advisory_lock(17, 0) LOOP
        IF clock_timestamp() > until THEN
            RAISE EXCEPTION 'another push to this node is under way' USING ERRCODE = '55P03';
        END IF;
        PERFORM pg_sleep(0.02);
    END LOOP;
END $$;
-- +goose StatementEnd

-- drop_kept drops what is kept of some tables; NULL: of all.
-- +goose StatementBegin
CREATE FUNCTION node.drop_kept(tabs text[]) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET client_min_messages = warning AS $$
DECLARE r text;
BEGIN
    FOR r IN DELETE FROM node.kept WHERE tabs IS NULL OR tab = ANY (tabs) RETURNING rel LOOP
        EXECUTE format('DROP TABLE IF EXISTS node.%I', r);
    END LOOP;
END $$;
-- +goose StatementEnd

-- forget_kept is drop_kept of all for the sender, where the rows have turned out not to be what they should.
-- +goose StatementBegin
CREATE FUNCTION node.forget_kept(to_n bigint, cluster text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM node.may_push(to_n, cluster);
    PERFORM node.hold_kept();
    PERFORM node.drop_kept(NULL);
    PERFORM pg_advisory_xact_lock(17, 0), pg_advisory_unlock_all(); -- from hold_kept to the end of the transaction
END $$;
-- +goose StatementEnd

-- end_kept drops what is kept once a push was applied, or this node is of another cluster or begins an epoch: whatever sets epoch_n. A push
-- that somebody else's is in the way of leaves it to the next: readers may be waiting by then.
-- +goose StatementBegin
CREATE FUNCTION node.end_kept() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM node.kept) AND ((OLD.cluster_id, OLD.cid) <> (NEW.cluster_id, NEW.cid) OR pg_try_advisory_xact_lock(17, 0)) THEN
        PERFORM node.drop_kept(NULL);
    END IF;
    PERFORM pg_advisory_unlock_all(); -- see hold_kept; what was tried here is held to the end of the transaction
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER end_kept AFTER UPDATE OF epoch_n ON node.position FOR EACH ROW EXECUTE FUNCTION node.end_kept();

-- resume gives the table with what an earlier push has brought of a table, how that goes on, as begin_copy says it, and of how many of the
-- sender's first rows it is. NULL where there is none, or where it was of other columns or types, and is dropped.
-- +goose StatementBegin
CREATE FUNCTION node.resume(to_n bigint, cluster text, t text, sent text[], sent_types text[], OUT rel text, OUT how text, OUT upto bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE own text[];
BEGIN
    PERFORM node.may_push(to_n, cluster);
    IF NOT EXISTS (SELECT FROM node.kept k WHERE k.tab = t) THEN
        RETURN;
    END IF;
    PERFORM node.hold_kept();
    own := node.types(t, sent);
    SELECT k.rel, k.upto INTO rel, upto FROM node.kept k WHERE k.tab = t AND (k.cols, k.types, k.here) = (sent, sent_types, own);
    IF rel IS NULL THEN
        PERFORM node.drop_kept(ARRAY[t]);
        RETURN;
    END IF;
    how := CASE WHEN own <> sent_types OR NOT node.columns(t) <@ sent OR EXISTS (SELECT FROM node.digest k WHERE k.tab = t AND k.n = 0) THEN 'rows'
        ELSE 'buckets' END;
END $$;
-- +goose StatementEnd

-- keep_copy makes the table that this transaction has copied so many rows into one that is kept, and gives its name. In a table that was made
-- for a merge they are not durable before.
-- +goose StatementBegin
CREATE FUNCTION node.keep_copy(t text, sent text[], sent_types text[], rows_ bigint) RETURNS text LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
DECLARE s record; name text := 'kept_' || format('config.%I', t)::regclass::oid;
BEGIN
    PERFORM node.caller('push');
    PERFORM node.hold_kept();
    SELECT * INTO STRICT s FROM pg_temp.beside WHERE tab = t;
    PERFORM node.drop_kept(ARRAY[t]);
    IF NOT s.swap THEN
        EXECUTE format('ALTER TABLE node.%I SET LOGGED', s.rel);
    END IF;
    EXECUTE format('ALTER TABLE node.%I RENAME TO %I', s.rel, name);
    DELETE FROM pg_temp.beside WHERE tab = t;
    INSERT INTO node.kept (tab, rel, cols, types, here, upto) VALUES (t, name, sent, sent_types, node.types(t, sent), rows_);
    RETURN name;
END $$;
-- +goose StatementEnd

-- note_kept says of how many of the sender's first rows what is kept of a table is by now.
-- +goose StatementBegin
CREATE FUNCTION node.note_kept(t text, rows_ bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM node.caller('push');
    PERFORM node.hold_kept();
    UPDATE node.kept SET upto = rows_ WHERE tab = t;
END $$;
-- +goose StatementEnd

-- compare_kept compares what is kept of a table with the sums of as many of the sender's first rows, which it has put into the bucket table, and
-- drops the buckets that differ. It gives these, how many rows of theirs the sender has, and how many rows are kept still.
-- +goose StatementBegin
CREATE FUNCTION node.compare_kept(t text, sent text[], count integer, OUT wrong integer[], OUT lacking bigint, OUT had bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD' SET timezone = 'UTC'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET intervalstyle = 'postgres' SET work_mem = '32MB' SET enable_sort = off SET jit = off AS $$
DECLARE name text;
BEGIN
    PERFORM node.caller('push');
    PERFORM node.hold_kept();
    SELECT rel INTO STRICT name FROM node.kept WHERE tab = t;
    TRUNCATE pg_temp.own_bucket;
    EXECUTE format('INSERT INTO pg_temp.own_bucket SELECT %s, count(*), sum(%s) FROM node.%I r GROUP BY 1', node.bucket_sql(t, count),
        node.hash_sql(sent, 1), name);
    SELECT coalesce(array_agg(coalesce(own.bucket, theirs.bucket)), '{}'), coalesce(sum(theirs.n), 0) INTO wrong, lacking
        FROM pg_temp.own_bucket own FULL JOIN pg_temp.bucket theirs ON theirs.bucket = own.bucket
        WHERE (own.n, own.x) IS DISTINCT FROM (theirs.n, theirs.x);
    SELECT coalesce(sum(n), 0) - lacking INTO had FROM pg_temp.bucket;
    EXECUTE format('DELETE FROM node.%I r WHERE %s = ANY ($1)', name, node.bucket_sql(t, count)) USING wrong;
END $$;
-- +goose StatementEnd

-- take_kept copies what is kept of a table into the one that begin_copy has just made: the rows of these buckets, or (NULL) of all.
-- +goose StatementBegin
CREATE FUNCTION node.take_kept(t text, needed integer[], count integer) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
DECLARE s record; k node.kept; names text;
BEGIN
    PERFORM node.caller('push');
    PERFORM node.hold_kept();
    SELECT * INTO STRICT s FROM pg_temp.beside WHERE tab = t;
    SELECT * INTO STRICT k FROM node.kept WHERE tab = t;
    names := (SELECT string_agg(quote_ident(c), ', ') FROM unnest(k.cols) c);
    EXECUTE format('INSERT INTO node.%I (%s) SELECT %s FROM node.%I', s.rel, names, names, k.rel);
    IF needed IS NOT NULL THEN
        UPDATE pg_temp.beside SET among = format('%s = ANY (%L::integer[])', node.bucket_sql(t, count), needed) WHERE tab = t AND NOT swap;
    END IF;
END $$;
-- +goose StatementEnd

-- text_sql gives the query for the rows of a table as text, in the order of node.columns, for COPY: that gives a type's own text, so that only
-- one that has another as a text is cast.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.text_sql(t text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('SELECT %s FROM config.%I r', string_agg(format('r.%I', c) || CASE WHEN y.typtype = 'b' AND NOT EXISTS (SELECT FROM pg_cast k
        WHERE k.castsource = y.oid AND k.casttarget = 'text'::regtype AND k.castmethod = 'f') THEN '' ELSE '::text' END, ', ' ORDER BY i), t)
    FROM unnest(node.columns(t)) WITH ORDINALITY x(c, i)
    JOIN pg_attribute a ON a.attrelid = format('config.%I', t)::regclass AND a.attname = c JOIN pg_type y ON y.oid = a.atttypid
$$;
-- +goose StatementEnd

-- end_copy takes in that all rows of a table are there, with the sums and the check that the sender made of what it sent. Nobody waits for
-- it: what takes long is done here, before node.push holds anything. One 64-bit sum is as good as two, at half the cost; to_y is what
-- older senders give.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.end_copy(t text, cols text[], to_n bigint, to_a numeric, to_b numeric, to_c numeric, to_d numeric, to_x numeric,
    to_y numeric) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
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
    IF own IS DISTINCT FROM ROW(to_n, to_x) THEN -- another version of PostgreSQL may hash otherwise
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

-- check_sql gives the query for (n, x): the number of rows of source and the sum of their hashes.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.check_sql(cols text[], source text) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('SELECT count(*), coalesce(sum(%s), 0) FROM %s r', node.hash_sql(cols, 1), source)
$$;
-- +goose StatementEnd

GRANT EXECUTE ON FUNCTION node.forget_kept(bigint, text), node.resume(bigint, text, text, text[], text[]), node.keep_copy(text, text[], text[], bigint),
    node.note_kept(text, bigint), node.compare_kept(text, text[], integer), node.take_kept(text, integer[], integer) TO mailproxy_push;
