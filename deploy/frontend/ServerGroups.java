package org.pytorch.serve.util;

import io.netty.channel.Channel;
import io.netty.channel.EventLoopGroup;
import io.netty.channel.group.ChannelGroup;
import io.netty.channel.group.DefaultChannelGroup;
import io.netty.util.concurrent.GlobalEventExecutor;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.Exchanges;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * The threads that serve connections, and their end.
 *
 * <p>It takes the place of TorchServe 0.12.0's own class of this name. That one closes every client's connection as
 * soon as it is told to stop; this one waits for the answers first. By then TorchServe has closed its ports, and it
 * ends the workers afterwards.
 */
public class ServerGroups {
    private static final Logger logger = LoggerFactory.getLogger(ServerGroups.class);
    private static final String DRAIN_VARIABLE = "TORCHPORT_DRAIN_SECONDS";
    private static final String DRAIN_SECONDS = "25";
    private static final int ACCEPTING_THREADS = 2;
    private static final int CLOSE_TIMEOUT_S = 10;
    private static final int END_TIMEOUT_S = 5;

    private final ConfigManager configManager;
    private final double drainSeconds;
    private ChannelGroup ports;
    private EventLoopGroup serverGroup;
    private EventLoopGroup childGroup;
    private EventLoopGroup metricsGroup;
    private EventLoopGroup backendGroup;
    private volatile boolean opened;

    public ServerGroups(ConfigManager configManager) {
        this.configManager = configManager;
        String given = System.getenv().getOrDefault(DRAIN_VARIABLE, DRAIN_SECONDS);
        try {
            drainSeconds = Double.parseDouble(given);
        } catch (NumberFormatException error) {
            throw new IllegalArgumentException(DRAIN_VARIABLE + " is '" + given + "'; write seconds", error);
        }
        init();
    }

    public final void init() {
        ports = new DefaultChannelGroup(GlobalEventExecutor.INSTANCE);
        serverGroup = Connector.newEventLoopGroup(ACCEPTING_THREADS);
        childGroup = Connector.newEventLoopGroup(configManager.getNettyThreads());
        if (configManager.isMetricApiEnable()) {
            metricsGroup = Connector.newEventLoopGroup(1);
        }
        backendGroup = Connector.newEventLoopGroup(configManager.getNettyClientThreads());
    }

    /** Ends what serves clients. Two threads call it: the one that heard the signal, and the main one. */
    public synchronized void shutdown(boolean graceful) {
        boolean served = opened;
        opened = false;
        ports.close().awaitUninterruptibly(CLOSE_TIMEOUT_S, TimeUnit.SECONDS);
        if (graceful && served) {
            drain();
        }
        List<EventLoopGroup> groups = new ArrayList<>(List.of(serverGroup, childGroup));
        if (metricsGroup != null) {
            groups.add(metricsGroup);
        }
        for (EventLoopGroup group : groups) {
            group.shutdownGracefully(0, graceful ? END_TIMEOUT_S : 0, TimeUnit.SECONDS);
        }
        for (EventLoopGroup group : groups) {
            group.terminationFuture().awaitUninterruptibly(END_TIMEOUT_S, TimeUnit.SECONDS);
        }
    }

    private void drain() {
        try {
            int refused = Exchanges.drain((long) (drainSeconds * 1e9));
            if (refused > 0) {
                logger.warn("{} connections had no answer within {} s and got 503", refused, drainSeconds);
            }
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        }
    }

    public EventLoopGroup getServerGroup() {
        return serverGroup;
    }

    public EventLoopGroup getChildGroup() {
        return childGroup;
    }

    public EventLoopGroup getMetricsGroup() {
        return metricsGroup;
    }

    public EventLoopGroup getBackendGroup() {
        return backendGroup;
    }

    public void registerChannel(Channel port) {
        opened = true;
        ports.add(port);
    }
}
