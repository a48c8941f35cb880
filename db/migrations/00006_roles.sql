-- Roles for the gate, and what is taken from everyone.

-- +goose Up
-- harden_database takes from everyone what belongs to the database as a whole; a copy of a database does not inherit it.
-- +goose StatementBegin
CREATE FUNCTION node.harden_database() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO mailproxy_peer, mailproxy_push', current_database());
END $$;
-- +goose StatementEnd

-- ensure_role makes a node's role where it is missing.
-- +goose StatementBegin
CREATE FUNCTION node.ensure_role(kind text, cid integer) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE r text := node.role(kind, cid);
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = r) THEN
        IF has_database_privilege('public', current_database(), 'TEMPORARY') THEN -- a copy; two that did it at once would fail
            PERFORM node.harden_database();
        END IF;
        BEGIN
            EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION CONNECTION LIMIT 8 IN ROLE %I',
                r, 'mailproxy_' || kind);
            EXECUTE format('ALTER ROLE %I SET statement_timeout = %L', r, CASE kind WHEN 'push' THEN '0' ELSE '60s' END);
            EXECUTE format('ALTER ROLE %I SET idle_in_transaction_session_timeout = ''60s''', r);
            EXECUTE format('ALTER ROLE %I SET search_path = pg_catalog', r);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL; -- made by another session just now
        END;
    END IF;
    RETURN r;
END $$;
-- +goose StatementEnd

-- backend_role says as whom the gate opens a session for a node, and makes that role.
-- +goose StatementBegin
CREATE FUNCTION node.backend_role(who integer) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position;
    IF who <= 0 OR EXISTS (SELECT FROM config.revoked r WHERE r.cid = who) THEN
        RAISE EXCEPTION 'CID % is no member', who USING ERRCODE = 'MP003';
    END IF;
    IF who = p.promised_owner AND who <> p.cid THEN
        RETURN node.ensure_role('push', who);
    END IF;
    IF EXISTS (SELECT FROM config.node) AND NOT EXISTS (SELECT FROM config.node m WHERE m.cid = who) THEN
        RAISE EXCEPTION 'CID % is no member', who USING ERRCODE = 'MP003';
    END IF;
    RETURN node.ensure_role('peer', who);
END $$;
-- +goose StatementEnd

-- ensure_roles makes the roles of all members, and ends and drops those of the others.
-- +goose StatementBegin
CREATE FUNCTION node.ensure_roles() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE r text; wanted text[];
BEGIN
    SELECT coalesce(array_agg(node.ensure_role(kind, cid)), '{}') INTO wanted
        FROM (SELECT cid FROM config.node UNION SELECT promised_owner FROM node.position WHERE promised_owner > 0) m,
            unnest(ARRAY['peer', 'push']) kind;
    FOR r IN SELECT rolname FROM pg_roles WHERE rolname ~ '^(peer|push)_[0-9]+'
        AND rolname = node.role(split_part(rolname, '_', 1), substring(rolname FROM '[0-9]+')::integer) AND rolname <> ALL (wanted) LOOP
        EXECUTE format('ALTER ROLE %I NOLOGIN', r);
        PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = r;
        BEGIN
            EXECUTE format('DROP ROLE IF EXISTS %I', r);
        EXCEPTION WHEN dependent_objects_still_exist OR object_in_use THEN
            NULL; -- it cannot log in any more
        END;
    END LOOP;
END $$;
-- +goose StatementEnd

-- end_long ends statements of peers that run longer than they may, and pushes that hold a transaction open and do nothing: a session
-- can take its own time limits away.
-- +goose StatementBegin
CREATE FUNCTION node.end_long(longest interval) RETURNS bigint LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE datname = current_database() AND (
        usename ~ '^peer_[0-9]+' AND state <> 'idle' AND clock_timestamp() - query_start > longest
        OR usename ~ '^push_[0-9]+' AND state LIKE 'idle in transaction%' AND clock_timestamp() - state_change > longest)
$$;
-- +goose StatementEnd

-- harden takes from everyone what no peer needs. Functions of the system are the superuser's to take away; it says whether it could.
-- +goose StatementBegin
CREATE FUNCTION node.harden() RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE f regprocedure;
BEGIN
    PERFORM node.harden_database();
    REVOKE ALL ON SCHEMA node, config, mail FROM PUBLIC;
    REVOKE ALL ON ALL FUNCTIONS IN SCHEMA node FROM PUBLIC;
    GRANT USAGE ON SCHEMA node, mail TO mailproxy_peer, mailproxy_push;
    GRANT SELECT ON ALL TABLES IN SCHEMA mail TO mailproxy_peer, mailproxy_push;
    GRANT EXECUTE ON FUNCTION node.position(), node.promise(bigint), node.heartbeat(bigint, integer, bigint, bytea),
        node.export_config(bigint, integer, bigint) TO mailproxy_peer, mailproxy_push;
    GRANT EXECUTE ON FUNCTION node.begin_push(bigint, text), node.push(bigint, text, bigint, bytea, text[]) TO mailproxy_push;
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        RETURN false;
    END IF;
    REVOKE ALL ON SCHEMA public FROM PUBLIC;
    REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC;
    FOR f IN SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace
        AND proname ~ '^(lo_|loread|lowrite|pg_(try_)?advisory_|pg_logical_emit_message)' LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
    END LOOP;
    RETURN true;
END $$;
-- +goose StatementEnd
