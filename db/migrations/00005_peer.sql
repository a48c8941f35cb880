-- What another node may do here. It logs in as a role of its own, so that session_user says who it is: peer_<cid>, and push_<cid>
-- where it owns the highest epoch that this node has promised. Both hold EXECUTE on the functions here and nothing else.

-- +goose Up
-- +goose StatementBegin
DO $$
DECLARE r text;
BEGIN
    FOREACH r IN ARRAY ARRAY['mailproxy_peer', 'mailproxy_push'] LOOP
        BEGIN -- roles belong to the server, and another database there may have made them
            EXECUTE format('CREATE ROLE %I NOLOGIN', r);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
    END LOOP;
END $$;
-- +goose StatementEnd

-- role gives the name of a node's role; in a database that is not called mailproxy it ends in the database's name, so that two
-- nodes can live on one server.
-- +goose StatementBegin
CREATE FUNCTION node.role(kind text, cid integer) RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT kind || '_' || cid || CASE current_database() WHEN 'mailproxy' THEN '' ELSE '_' || current_database() END
$$;
-- +goose StatementEnd

-- caller gives the CID whose role is logged in; SET ROLE and settings do not change session_user.
-- +goose StatementBegin
CREATE FUNCTION node.caller(kinds text) RETURNS integer LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE m text[] := regexp_match(session_user, '^(' || kinds || ')_([0-9]{1,9})');
BEGIN
    IF m IS NULL OR session_user <> node.role(m[1], m[2]::integer) THEN
        RAISE EXCEPTION '% is not a peer', session_user USING ERRCODE = 'MP003';
    END IF;
    IF EXISTS (SELECT FROM config.revoked r WHERE r.cid = m[2]::integer) THEN
        RAISE EXCEPTION 'CID % was deleted', m[2] USING ERRCODE = 'MP003';
    END IF;
    RETURN m[2]::integer;
END $$;
-- +goose StatementEnd

-- state is this node's position and promise.
-- +goose StatementBegin
CREATE FUNCTION node.state(OUT cid integer, OUT cluster_id text, OUT epoch_n bigint, OUT epoch_owner integer, OUT serial bigint,
    OUT digest bytea, OUT promised_n bigint, OUT promised_owner integer, OUT pushed_at timestamptz, OUT journal_len integer,
    OUT rewrites bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.cid, p.cluster_id, p.epoch_n, p.epoch_owner, p.serial, node.kept_digest(), p.promised_n, p.promised_owner, p.pushed_at,
        (SELECT count(*)::int FROM node.journal), p.rewrites FROM node.position p
$$;
-- +goose StatementEnd

-- sums gives the kept sums of the tables that have rows, as text by table.
-- +goose StatementBegin
CREATE FUNCTION node.sums() RETURNS jsonb LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(jsonb_object_agg(k.tab, concat_ws(' ', k.n, k.a, k.b, k.c, k.d)), '{}') FROM node.digest k WHERE k.n <> 0
$$;
-- +goose StatementEnd

-- position is state for peers.
-- +goose StatementBegin
CREATE FUNCTION node.position(OUT cid integer, OUT cluster_id text, OUT epoch_n bigint, OUT epoch_owner integer, OUT serial bigint,
    OUT digest bytea, OUT promised_n bigint, OUT promised_owner integer, OUT pushed_at timestamptz, OUT journal_len integer,
    OUT rewrites bigint, OUT role_kind text, OUT schema_version bigint, OUT sums jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM node.caller('peer|push');
    SELECT s.* INTO cid, cluster_id, epoch_n, epoch_owner, serial, digest, promised_n, promised_owner, pushed_at, journal_len, rewrites
        FROM node.state() s;
    role_kind := split_part(session_user, '_', 1);
    SELECT max(version_id) INTO schema_version FROM node.migration WHERE is_applied;
    sums := node.sums();
END $$;
-- +goose StatementEnd

-- promise promises epoch (new_n, caller), durably: lower ones are refused from then on. The same again is no error. A node that
-- knows no members yet, since it has just joined, takes the word of whoever the tunnel let in.
-- +goose StatementBegin
CREATE FUNCTION node.promise(new_n bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position; who integer := node.caller('peer|push');
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF NOT EXISTS (SELECT FROM config.node m WHERE m.cid = who AND m.promotable) AND EXISTS (SELECT FROM config.node) THEN
        RAISE EXCEPTION 'CID % is not promotable', who USING ERRCODE = 'MP003';
    END IF;
    IF new_n > p.promised_n + 1000 THEN
        RAISE EXCEPTION 'epoch % is too far above %', new_n, p.promised_n USING ERRCODE = 'MP005';
    END IF;
    PERFORM node.set_promise(p, new_n, who);
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.set_promise(p node.position, new_n bigint, who integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (new_n, who) < (p.promised_n, p.promised_owner) THEN
        RAISE EXCEPTION 'epoch %.% is promised', p.promised_n, p.promised_owner
            USING ERRCODE = 'MP002', DETAIL = p.promised_owner::text;
    END IF;
    IF (new_n, who) > (p.promised_n, p.promised_owner) THEN
        UPDATE node.position SET promised_n = new_n, promised_owner = who;
        PERFORM pg_notify('mailproxy', ''); -- the daemon looks at its role
    END IF;
END $$;
-- +goose StatementEnd

-- heartbeat notes that the caller is there, at that position. From the master it says also that this node is in sync, where it is.
-- +goose StatementBegin
CREATE FUNCTION node.heartbeat(n bigint, owner integer, at_serial bigint, at_digest bytea) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE who integer := node.caller('peer|push');
BEGIN
    INSERT INTO node.heartbeat (cid, heard_at, epoch_n, epoch_owner, serial) VALUES (who, now(), n, owner, at_serial)
    ON CONFLICT (cid) DO UPDATE SET heard_at = excluded.heard_at, epoch_n = excluded.epoch_n, epoch_owner = excluded.epoch_owner,
        serial = excluded.serial;
    UPDATE node.position p SET pushed_at = now() WHERE p.promised_owner = who AND (p.epoch_n, p.epoch_owner, p.serial) = (n, owner, at_serial)
        AND node.kept_digest() = at_digest;
END $$;
-- +goose StatementEnd

-- export_config gives every row of config, at exactly that position or not at all. One snapshot, since it is STABLE.
-- +goose StatementBegin
CREATE FUNCTION node.export_config(n bigint, owner integer, at_serial bigint) RETURNS TABLE (tab text, op text, row_ jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
    PERFORM node.caller('peer|push');
    IF NOT EXISTS (SELECT FROM node.position p WHERE (p.epoch_n, p.epoch_owner, p.serial) = (n, owner, at_serial)) THEN
        RAISE EXCEPTION 'not at %.%/% any more', n, owner, at_serial USING ERRCODE = 'MP007';
    END IF;
    RETURN QUERY EXECUTE node.whole_sql(ARRAY(SELECT node.tables()));
END $$;
-- +goose StatementEnd

-- begin_push makes the staging table for who may push, before any row is sent.
-- +goose StatementBegin
CREATE FUNCTION node.begin_push(to_n bigint, cluster text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM node.may_push(to_n, cluster);
    PERFORM node.stage();
END $$;
-- +goose StatementEnd

-- may_push refuses whoever is not the owner of the highest epoch promised here.
-- +goose StatementBegin
CREATE FUNCTION node.may_push(to_n bigint, cluster text) RETURNS integer LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position; who integer := node.caller('push');
BEGIN
    SELECT * INTO STRICT p FROM node.position;
    IF p.cluster_id <> cluster OR p.cid = who THEN
        RAISE EXCEPTION 'this node is in another cluster' USING ERRCODE = 'MP008';
    END IF;
    IF (to_n, who) < (p.promised_n, p.promised_owner) THEN
        RAISE EXCEPTION 'epoch %.% is promised', p.promised_n, p.promised_owner
            USING ERRCODE = 'MP002', DETAIL = p.promised_owner::text;
    END IF;
    IF (to_n, who) > (p.promised_n, p.promised_owner) THEN
        RAISE EXCEPTION 'epoch %.% was not promised', to_n, who USING ERRCODE = 'MP003';
    END IF;
    RETURN who;
END $$;
-- +goose StatementEnd

-- push applies what the caller has put into the staging table in this transaction. Within an epoch it never takes a serial back: of
-- two pushes at once, the one with the older rows may come last.
-- +goose StatementBegin
CREATE FUNCTION node.push(to_n bigint, cluster text, to_serial bigint, to_digest bytea, whole text[], OUT journalled bigint, OUT touched bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE who integer;
BEGIN
    PERFORM FROM node.position FOR UPDATE;
    who := node.may_push(to_n, cluster);
    IF EXISTS (SELECT FROM node.position p WHERE (p.epoch_n, p.epoch_owner) = (to_n, who) AND p.serial > to_serial) THEN
        RAISE EXCEPTION 'this node is past %.%/%', to_n, who, to_serial USING ERRCODE = 'MP010';
    END IF;
    SELECT a.journalled, a.touched INTO journalled, touched
        FROM node.apply_staged(to_n, who, to_serial, to_digest, whole, to_n, who) a;
END $$;
-- +goose StatementEnd

-- adopt is push that a node asks for: one that promotes itself takes the newest position that its voters know, under its own promise
-- and before it has begun that epoch; a slave takes its master's again.
-- +goose StatementBegin
CREATE FUNCTION node.adopt(to_n bigint, to_owner integer, to_serial bigint, to_digest bytea, OUT journalled bigint, OUT touched bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF NOT (p.promised_owner = p.cid AND (p.promised_n, p.promised_owner) > (to_n, to_owner)
                AND (p.promised_n, p.promised_owner) > (p.epoch_n, p.epoch_owner)
            OR p.promised_owner <> p.cid AND (p.promised_n, p.promised_owner) = (to_n, to_owner)) THEN
        RAISE EXCEPTION 'epoch %.% is promised', p.promised_n, p.promised_owner
            USING ERRCODE = 'MP002', DETAIL = p.promised_owner::text;
    END IF;
    SELECT a.journalled, a.touched INTO journalled, touched FROM node.apply_staged(to_n, to_owner, to_serial, to_digest,
        ARRAY(SELECT node.tables()), p.promised_n, p.promised_owner) a;
END $$;
-- +goose StatementEnd
