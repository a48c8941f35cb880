-- The write guard and the automatic configuration commit: triggers by statement on every table of config.

-- +goose Up
-- applying says whether this transaction is one that brings in another node's rows (node.begin_apply): no session setting opens
-- the guard, since anyone can set one.
-- +goose StatementBegin
CREATE FUNCTION node.applying() RETURNS boolean LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(apply_xid = pg_current_xact_id() AND apply_at = transaction_timestamp(), false) FROM node.position
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.guard() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    -- The lock comes first of all: commits, pushes and promises wait for each other here, and never deadlock later.
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF node.applying() OR (p.epoch_owner = p.cid AND p.promised_n = p.epoch_n AND p.promised_owner = p.epoch_owner) THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'configuration is written on the master (CID %), this is CID %', p.promised_owner, p.cid
        USING ERRCODE = 'MP001', DETAIL = p.promised_owner::text;
END $$;
-- +goose StatementEnd

-- take_serial makes this transaction a configuration commit: the first statement takes the next serial and writes the history row.
-- +goose StatementBegin
CREATE FUNCTION node.take_serial() RETURNS node.position LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    UPDATE node.position SET serial = serial + 1, commit_xid = pg_current_xact_id(), commit_at = transaction_timestamp()
        WHERE (commit_xid, commit_at) IS DISTINCT FROM (pg_current_xact_id(), transaction_timestamp()) RETURNING * INTO p;
    IF NOT FOUND THEN
        SELECT * INTO STRICT p FROM node.position;
        RETURN p;
    END IF;
    INSERT INTO config.history (serial, epoch_n, epoch_owner, at, who, node, command)
        VALUES (p.serial, p.epoch_n, p.epoch_owner, clock_timestamp(),
            coalesce(nullif(current_setting('mailproxy.who', true), ''), session_user), p.cid,
            coalesce(current_setting('mailproxy.command', true), ''));
    PERFORM node.trim_history();
    PERFORM pg_notify('mailproxy', '');
    RETURN p;
END $$;
-- +goose StatementEnd

-- trim_history keeps the newest 1,000 commits, and of those the ones within 90 days before the newest. It looks at nothing but
-- the rows, so that every node keeps the same ones.
-- +goose StatementBegin
CREATE FUNCTION node.trim_history() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE newest config.history; bound bigint;
BEGIN
    SELECT * INTO newest FROM config.history ORDER BY serial DESC, epoch_n DESC, epoch_owner DESC LIMIT 1;
    SELECT max(serial) INTO bound FROM config.history WHERE serial <= newest.serial - 1000 OR at < newest.at - interval '90 days';
    IF bound IS NOT NULL THEN
        DELETE FROM config.change WHERE serial <= bound;
        DELETE FROM config.history WHERE serial <= bound;
    END IF;
END $$;
-- +goose StatementEnd

-- attach gives every table of config its triggers, written for its columns. It runs after every migration, and takes its tables
-- from the catalog: a new one needs nothing more.
-- +goose StatementBegin
CREATE FUNCTION node.attach() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE t text;
BEGIN
    FOR t IN SELECT node.tables() LOOP
        IF node.key(t) IS NULL THEN
            RAISE EXCEPTION 'config.% has no primary key', t;
        END IF;
        INSERT INTO node.digest (tab) VALUES (t) ON CONFLICT DO NOTHING;
        EXECUTE format('CREATE OR REPLACE TRIGGER a_guard BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON config.%I
            FOR EACH STATEMENT EXECUTE FUNCTION node.guard()', t);
        PERFORM node.attach_sums(t);
        IF t NOT IN ('history', 'change') THEN
            PERFORM node.attach_record(t);
        END IF;
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.attach_sums(t text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    change text := 'UPDATE node.digest k SET n = k.n %1$s x.n, a = k.a %1$s x.a, b = k.b %1$s x.b, c = k.c %1$s x.c, d = k.d %1$s x.d
        FROM (%2$s) x WHERE k.tab = %3$L AND x.n > 0;';
BEGIN
    EXECUTE format($q$CREATE OR REPLACE FUNCTION node.%1$I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD' SET timezone = 'UTC' SET extra_float_digits = 1
        SET bytea_output = 'hex' SET intervalstyle = 'postgres' AS $f$
        BEGIN
            IF TG_OP IN ('INSERT', 'UPDATE') THEN
                %2$s
            END IF;
            IF TG_OP IN ('UPDATE', 'DELETE') THEN
                %3$s
            END IF;
            IF TG_OP = 'TRUNCATE' THEN
                UPDATE node.digest SET n = 0, a = 0, b = 0, c = 0, d = 0 WHERE tab = %4$L;
            END IF;
            RETURN NULL;
        END $f$ $q$, 'sum_' || t,
        format(change, '+', node.sum_sql(t, 'new_rows'), t), format(change, '-', node.sum_sql(t, 'old_rows'), t), t);
    PERFORM node.attach_trigger(t, 'b_sum', 'sum_' || t);
    EXECUTE format('CREATE OR REPLACE TRIGGER b_sum_truncate AFTER TRUNCATE ON config.%I
        FOR EACH STATEMENT EXECUTE FUNCTION node.%I()', t, 'sum_' || t);
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION node.attach_trigger(t text, name text, fn text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER INSERT ON config.%I REFERENCING NEW TABLE AS new_rows
        FOR EACH STATEMENT EXECUTE FUNCTION node.%I()', name || '_insert', t, fn);
    EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER UPDATE ON config.%I REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
        FOR EACH STATEMENT EXECUTE FUNCTION node.%I()', name || '_update', t, fn);
    EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER DELETE ON config.%I REFERENCING OLD TABLE AS old_rows
        FOR EACH STATEMENT EXECUTE FUNCTION node.%I()', name || '_delete', t, fn);
END $$;
-- +goose StatementEnd

-- attach_record writes the trigger that puts a statement's changes into config.change. Rows that an UPDATE left as they were
-- are none; where it changed a key, that is a delete and an insert. Rows are compared byte by byte (*<>), as the digest does: 1.0
-- and 1.00 are equal and yet two. The settings make one text of a key, whatever the session says.
-- The names of rows end in _, since a column of the same name would win.
-- +goose StatementBegin
CREATE FUNCTION node.attach_record(t text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    keys text[] := node.key(t);
    keyof text := (SELECT 'jsonb_build_object(' || string_agg(format('%1$L, %%1$s.%1$I', k), ', ') || ')' FROM unnest(keys) k);
    image text := format('to_jsonb(%%1$s) - %L::text[]', node.secrets(t));
    add text := 'INSERT INTO config.change (serial, epoch_n, epoch_owner, seq, tab, op, key, old, new)
        SELECT p.serial, p.epoch_n, p.epoch_owner, last + row_number() OVER (), %L, %s, %s, %s, %s FROM %s;';
BEGIN
    EXECUTE format($q$CREATE OR REPLACE FUNCTION node.%1$I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD' SET timezone = 'UTC' SET extra_float_digits = 1
        SET bytea_output = 'hex' SET intervalstyle = 'postgres' AS $f$
        DECLARE p node.position; last bigint; changed boolean;
        BEGIN
            IF node.applying() THEN
                RETURN NULL;
            END IF;
            IF TG_OP = 'INSERT' THEN
                changed := EXISTS (SELECT FROM new_rows);
            ELSIF TG_OP = 'DELETE' THEN
                changed := EXISTS (SELECT FROM old_rows);
            ELSIF TG_OP = 'TRUNCATE' THEN
                changed := EXISTS (SELECT FROM config.%2$I);
            ELSE
                changed := EXISTS (SELECT FROM old_rows old_ FULL JOIN new_rows new_ ON %3$s WHERE (old_ *<> new_) IS NOT FALSE);
            END IF;
            IF NOT changed THEN
                RETURN NULL;
            END IF;
            p := node.take_serial();
            SELECT coalesce(max(c.seq), 0) INTO last FROM config.change c
                WHERE c.serial = p.serial AND c.epoch_n = p.epoch_n AND c.epoch_owner = p.epoch_owner;
            IF TG_OP = 'INSERT' THEN
                %4$s
            ELSIF TG_OP = 'DELETE' THEN
                %5$s
            ELSIF TG_OP = 'TRUNCATE' THEN
                %6$s
            ELSE
                %7$s
                SELECT coalesce(max(c.seq), 0) INTO last FROM config.change c
                    WHERE c.serial = p.serial AND c.epoch_n = p.epoch_n AND c.epoch_owner = p.epoch_owner;
                %8$s
            END IF;
            RETURN NULL;
        END $f$ $q$, 'record_' || t, t,
        (SELECT string_agg(format('old_.%1$I = new_.%1$I', k), ' AND ') FROM unnest(keys) k),
        format(add, t, '''insert''', format(keyof, 'new_'), 'NULL', format(image, 'new_'), 'new_rows new_'),
        format(add, t, '''delete''', format(keyof, 'old_'), format(image, 'old_'), 'NULL', 'old_rows old_'),
        format(add, t, '''delete''', format(keyof, 'old_'), format(image, 'old_'), 'NULL', format('config.%I old_', t)),
        -- first what an UPDATE moved away, then what it changed or moved here
        format(add, t, '''delete''', format(keyof, 'old_'), format(image, 'old_'), 'NULL', format('old_rows old_ WHERE NOT EXISTS
            (SELECT FROM new_rows new_ WHERE %s)', (SELECT string_agg(format('old_.%1$I = new_.%1$I', k), ' AND ') FROM unnest(keys) k))),
        format(add, t, format('CASE WHEN old_.%I IS NULL THEN ''insert'' ELSE ''update'' END', keys[1]), format(keyof, 'new_'),
            format('CASE WHEN old_.%I IS NOT NULL THEN %s END', keys[1], format(image, 'old_')), format(image, 'new_'),
            format('new_rows new_ LEFT JOIN old_rows old_ ON %s WHERE (old_ *<> new_) IS NOT FALSE',
                (SELECT string_agg(format('old_.%1$I = new_.%1$I', k), ' AND ') FROM unnest(keys) k))));
    PERFORM node.attach_trigger(t, 'c_record', 'record_' || t);
    EXECUTE format('CREATE OR REPLACE TRIGGER c_record_truncate BEFORE TRUNCATE ON config.%I
        FOR EACH STATEMENT EXECUTE FUNCTION node.%I()', t, 'record_' || t);
END $$;
-- +goose StatementEnd
